"""Command lines: they build objects from settings and start programs."""
