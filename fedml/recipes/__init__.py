"""Recipes that come with fedml; the list is in `fedml.learning.recipe`. This imports none."""
