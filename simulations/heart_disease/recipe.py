"""Heart disease as FLamby models it: logistic regression with one output, on standardised rows.

Source: du Terrail et al. 2022, arXiv:2210.04620, Fed-Heart-Disease. Unlike the recipe that comes
with fedml, rows are standardised before (`data.py`), so the model has no scaling of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.learning.recipe import Rows
from fedml.recipes.heart_disease import FEATURES
from fedml.recipes.heart_disease import HeartDisease as Shipped


class HeartDisease:
    """The recipe; scores `accuracy`. The one output is the logit of disease."""

    labels: tuple[str, ...] = ("present",)
    precision = torch.float32

    def build(self) -> nn.Module:
        """Return one linear layer, drawn at random as PyTorch does."""
        return nn.Linear(len(FEATURES), 1, dtype=self.precision)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean binary cross entropy."""
        logits = output[..., 0]
        loss: Tensor = functional.binary_cross_entropy_with_logits(logits, target.to(logits))
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`: 1 where the likelier answer is the right one."""
        return {"accuracy": ((output[..., 0] > 0) == (target > 0)).float()}

    def read(self, path: Path) -> Rows:
        """Return a raw UCI file's complete rows, features in FLamby's order, before scaling."""
        rows = Shipped().read(path)
        return Rows(rows.x.to(self.precision), rows.y)

    def example(self, rows: int) -> Tensor:
        """Return made-up standardised rows."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(rows, len(FEATURES), generator=generator, dtype=self.precision)


class HeartDisease64(HeartDisease):
    """The same in double precision, and from zero: what federated Newton is held against."""

    precision = torch.float64

    def build(self) -> nn.Module:
        """Return one linear layer that starts at zero."""
        model = nn.Linear(len(FEATURES), 1, dtype=self.precision)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model
