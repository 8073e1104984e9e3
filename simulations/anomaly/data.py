"""Breast cancer samples at clinics that train on benign ones alone; the malignant ones score.

Data: the Wisconsin Diagnostic Breast Cancer set as scikit-learn ships it (Wolberg, Street and
Mangasarian 1995, CC BY 4.0), so there is nothing to fetch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data, ShippedData


@dataclass(frozen=True)
class Clinics:
    """`sites` clinics, each with its own kind of benign samples.

    Benign samples are sorted by mean radius and cut into `sites` parts, so what is common at one
    clinic is unheard of at another. A third of each part is held out, and a malignant sample is
    held out at a clinic drawn at random. `only` is the place of the one clinic there shall be
    to train; all hold out the same rows then, to be scored.
    """

    sites: int = 5
    seed: int = 0
    only: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.sites <= 100:
            raise ConfigError(f"population.sites {self.sites}: use 1 to 100 clinics")
        if self.only is not None and not 0 <= self.only < self.sites:
            raise ConfigError(f"population.only {self.only}: use 0 to {self.sites - 1}")

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Return the clinics' rows; `data` is not needed."""
        rows = ShippedData("breast_cancer").rows(recipe)
        random = np.random.default_rng(self.seed)
        benign = (rows.y == 0).nonzero()[:, 0].numpy()
        by_size = benign[np.argsort(rows.x[benign, 0].numpy(), kind="stable")]
        malignant = random.permutation((rows.y == 1).nonzero()[:, 0].numpy())
        dealt = zip(
            np.array_split(by_size, self.sites), np.array_split(malignant, self.sites), strict=True
        )
        holdings = []
        for own, strange in dealt:
            mine = random.permutation(own)
            third = len(mine) // 3
            held = np.concatenate([mine[:third], strange])
            holdings.append(Holding(_take(rows, mine[third:]), _take(rows, held)))
        return self._named(holdings)

    def _named(self, holdings: list[Holding]) -> Mapping[SiteId, Holding]:
        if self.only is None:
            return {SiteId(f"clinic-{k}"): one for k, one in enumerate(holdings)}
        x, y = (torch.cat([getattr(one.held_out, part) for one in holdings]) for part in ("x", "y"))
        return {SiteId(f"clinic-{self.only}"): Holding(holdings[self.only].train, Rows(x, y))}


def _take(rows: Rows, places: np.typing.NDArray[np.int64]) -> Rows:
    return rows.take(torch.from_numpy(places))
