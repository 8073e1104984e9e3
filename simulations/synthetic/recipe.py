"""Multinomial logistic regression on FedProx's synthetic rows: Li et al. 2020, arXiv:1812.06127."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows
from simulations.synthetic.data import CLASSES, DIMENSIONS


class Synthetic:
    """The recipe; scores `accuracy`."""

    labels = tuple(f"class-{k}" for k in range(CLASSES))

    def build(self) -> nn.Module:
        """Return one linear layer that starts at zero."""
        model = nn.Linear(DIMENSIONS, CLASSES)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`: 1 where the likeliest class is the right one."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Refuse: these rows are drawn, see `data.Synthetic`."""
        raise ConfigError(f"{path}: synthetic rows are drawn, not read; use experiment=synthetic")

    def example(self, rows: int) -> Tensor:
        """Return standard normal rows."""
        return torch.randn(rows, DIMENSIONS, generator=torch.Generator().manual_seed(0))
