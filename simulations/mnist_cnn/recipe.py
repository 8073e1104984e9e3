"""The CNN of McMahan et al. 2017, arXiv:1602.05629, section 3: 1,663,370 parameters."""

from __future__ import annotations

from torch import nn

from simulations.mnist import Pixels
from simulations.mnist_2nn.recipe import TwoLayers


class Convolutions(TwoLayers):
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
            nn.Linear(7 * 7 * 64, 512),
            nn.ReLU(),
            nn.Linear(512, 10),
        )
