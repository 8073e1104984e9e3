"""Recipes for tests of faults: a moment of training, and three chunks of model or very few bytes.

They are registered with entry points of their own (see `fleet.register`), so coordinator, sites
and workers find them as they find any installed recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.learning.recipe import Rows

FEATURES = 4


class Light:
    """Two classes from four features; scores `accuracy`."""

    labels = ("no", "yes")
    width = 80_000  # 560,000 floats and a few: what travels is 2.1 MiB, so three chunks

    def build(self) -> nn.Module:
        """Return two layers, the same each time."""
        first, last = nn.Linear(FEATURES, self.width), nn.Linear(self.width, len(self.labels))
        generator = torch.Generator().manual_seed(7)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(first, nn.Tanh(), last)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        return functional.cross_entropy(output, target)

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return whether each row is classified rightly."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Return the rows of a file with five numbers a line, the class last."""
        table = [[float(cell) for cell in line.split(",")] for line in path.read_text().split()]
        values = torch.tensor(table)
        return Rows(values[:, :FEATURES], values[:, FEATURES].long())

    def example(self, rows: int) -> Tensor:
        """Return noise."""
        return torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(0))


class Small(Light):
    """The same, with a model of a few bytes: for runs under privacy, whose noise takes its time."""

    width = 8
