"""The benchmarks' workloads as recipes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.workloads import W1, W2, Workload
from fedml.errors import ConfigError
from fedml.learning.recipe import Rows


class _Classifier:
    workload: Workload

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the classes' names."""
        return tuple(f"class {number}" for number in range(self.workload.classes))

    def build(self) -> nn.Module:
        """Return a fresh model."""
        return self.workload.model()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return cross_entropy(output, target)

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return whether each row is classified rightly."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Refuse: there are no files."""
        raise ConfigError(f"{path}: the rows of {self.workload.name} are made from a seed")

    def example(self, rows: int) -> Tensor:
        """Return noise."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(rows, *self.workload.shape, generator=generator)


class ImageModel(_Classifier):
    """W1."""

    workload = W1


class SmallModel(_Classifier):
    """W2."""

    workload = W2
