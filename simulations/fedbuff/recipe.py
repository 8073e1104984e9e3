"""Softmax regression on digits of 8 x 8 pixels: the linear model that `simulations.privacy` has."""

from simulations.privacy.recipe import digits

__all__ = ["digits"]
