"""The CNN of McMahan et al. 2017, arXiv:1602.05629: 1,663,370 parameters.

Two 5 x 5 convolutions of 32 and 64 channels, each with a 2 x 2 max pooling, and a layer of 512.
"""

from __future__ import annotations

from torch import nn

from simulations.mnist import Pixels
from simulations.mnist_2nn.recipe import TwoLayers


class Convolutional(TwoLayers):
    """The recipe; it differs from the 2NN's in its model alone."""

    def build(self) -> nn.Module:
        """Return the network, drawn at random as PyTorch does."""
        return nn.Sequential(
            Pixels(1, 28, 28),
            nn.Conv2d(1, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )
