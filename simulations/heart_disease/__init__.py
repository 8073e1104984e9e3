"""Fed-Heart-Disease: four real hospitals."""
