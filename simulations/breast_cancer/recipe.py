"""The recipe is the one that comes with fedml."""

from fedml.recipes.breast_cancer import BreastCancer

__all__ = ["BreastCancer"]
