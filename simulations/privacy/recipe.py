"""Linear softmax models on prepared rows: breast cancer, and handwritten digits.

Rows come standardised or normalised (`data.py`), so the models have no scaling of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows


@dataclass(frozen=True)
class Linear:
    """A recipe of one layer, from zero, that scores `accuracy`; `dataset` is scikit-learn's."""

    dataset: str
    features: int
    labels: tuple[str, ...]

    def build(self) -> nn.Module:
        """Return one linear layer, which starts at zero."""
        linear = nn.Linear(self.features, len(self.labels))
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`: 1 where the likeliest label is the right one."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Raise `ConfigError`: the rows come with scikit-learn and are dealt by `Sites`."""
        raise ConfigError(f"{path}: this recipe reads no file; use experiment=privacy")

    def example(self, rows: int) -> Tensor:
        """Return made-up prepared rows."""
        return torch.randn(rows, self.features, generator=torch.Generator().manual_seed(0))


def cancer() -> Linear:
    """Return the recipe of the Wisconsin Diagnostic Breast Cancer set, 30 measures."""
    return Linear("breast_cancer", 30, ("malignant", "benign"))


def digits() -> Linear:
    """Return the recipe of scikit-learn's digits, 8 x 8 pixels."""
    return Linear("digits", 64, tuple("0123456789"))
