"""Digits of 8 x 8 pixels from scikit-learn, softmax regression, and sites without rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from fedml.simulation.population.skew import Population


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
        """Refuse: these rows come with scikit-learn, see `Digits`."""
        raise ConfigError(f"{path}: the digits come with scikit-learn; deal out Digits")

    def example(self, rows: int) -> Tensor:
        """Return random pixels."""
        return torch.randint(0, 17, (rows, 64), generator=torch.Generator().manual_seed(0)).float()


@dataclass(frozen=True)
class Digits:
    """All of them, for any population to deal out."""

    def rows(self, recipe: Recipe) -> Rows:
        """Return pixels of 0 to 16 and the digits."""
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        return Rows(torch.tensor(pixels, dtype=torch.float32), torch.tensor(digits))


@dataclass(frozen=True)
class Joined:
    """A population that `guests` join who bring no rows of their own, but copies of the first's.

    So who lies takes no rows from the others: what is lost is lost to the lies.
    """

    hosts: Population
    guests: int = 2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal `data` out to the hosts; the guests are guest-0 and so on."""
        dealt = dict(self.hosts.deal(recipe, data))
        copies = [*dealt.values()][: self.guests]
        return {**dealt, **{SiteId(f"guest-{k}"): one for k, one in enumerate(copies)}}
