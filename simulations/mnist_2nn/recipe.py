"""The "2NN" of McMahan et al. 2017, arXiv:1602.05629: two hidden layers, 199,210 parameters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional

from fedml.learning.recipe import Rows
from simulations.mnist import LABELS, Pixels, example_images, read


class TwoLayers:
    """The recipe; scores `accuracy`. Rows are images of 784 bytes."""

    labels = LABELS

    def build(self) -> nn.Module:
        """Return the network, drawn at random as PyTorch does."""
        return nn.Sequential(
            Pixels(784),
            nn.Linear(784, 200),
            nn.ReLU(),
            nn.Linear(200, 200),
            nn.ReLU(),
            nn.Linear(200, 10),
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`: 1 where the likeliest digit is the right one."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Return the rows of an idx file of images, with the labels' file beside it."""
        return read(path)

    def example(self, rows: int) -> Tensor:
        """Return made-up images."""
        return example_images(rows)
