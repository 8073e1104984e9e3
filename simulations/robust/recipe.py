"""Softmax regression on digits of 8 x 8 pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows


class Scaled(nn.Module):
    """Brings pixels of 0 to 16 to 0 to 1."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x / 16."""
        return x / 16


class SoftmaxRegression:
    """The recipe; scores `accuracy`."""

    labels = tuple(map(str, range(10)))

    def build(self) -> nn.Module:
        """Return one linear layer that starts at zero."""
        layer = nn.Linear(64, 10)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return nn.Sequential(Scaled(), layer)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`: 1 where the likeliest digit is the right one."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Refuse: these rows come with scikit-learn, see `data.Sites`."""
        raise ConfigError(f"{path}: the digits come with scikit-learn; see simulations/robust")

    def example(self, rows: int) -> Tensor:
        """Return random pixels."""
        return torch.randint(0, 17, (rows, 64), generator=torch.Generator().manual_seed(0)).float()
