"""MNIST dealt out as Li et al. 2020 do, arXiv:1812.06127, appendix C.1, and their code.

Site u knows the digits u mod 10 and (u + 1) mod 10: five images of each, and then as many as a
log-normal law gives it of what is left. A tenth of each site's images is held out.
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
from fedml.simulation.population import Data
from simulations.mnist import test_rows, training_rows

_START = 5  # images of each digit that every site has


@dataclass(frozen=True)
class PowerLaw:
    """`sites` sites, a multiple of ten, over all 70,000 images."""

    sites: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sites < 10 or self.sites % 10 or self.sites > 5000:
            raise ConfigError(f"{self.sites} sites: give a multiple of ten, 10 to 5000")

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal out the images; `data` is not needed."""
        train, test = training_rows(), test_rows()
        rows = Rows(torch.cat([train.x, test.x]), torch.cat([train.y, test.y]))
        random = np.random.default_rng(self.seed)
        width = len(str(self.sites - 1))
        return {
            SiteId(f"site-{number:0{width}d}"): _holding(rows, random.permutation(mine))
            for number, mine in enumerate(self._places(rows, random))
        }

    def _places(self, rows: Rows, random: np.random.Generator) -> list[np.typing.NDArray[np.int64]]:
        """Return each site's rows, as places."""
        heaps = [random.permutation(np.flatnonzero(rows.y.numpy() == d)) for d in range(10)]
        shares = random.lognormal(0, 2, (10, self.sites // 10, 2))
        left = np.array([len(heap) - 2 * _START * self.sites // 10 for heap in heaps])
        # site u's j-th digit is u + j: each digit is shared among the sites of two groups
        for digit in range(10):
            groups = (shares[digit, :, 0], shares[digit - 1, :, 1])
            total = sum(float(group.sum()) for group in groups)
            for group in groups:
                group *= left[digit] / total
        used = [0] * 10
        places = []
        for site in range(self.sites):
            mine = []
            for j in range(2):
                digit = (site + j) % 10
                count = _START + int(shares[site % 10, site // 10, j])
                mine.append(heaps[digit][used[digit] : used[digit] + count])
                used[digit] += count
            places.append(np.concatenate(mine))
        return places


def _holding(rows: Rows, places: np.typing.NDArray[np.int64]) -> Holding:
    kept = int(0.9 * len(places))
    parts = (torch.from_numpy(part) for part in (places[:kept], places[kept:]))
    return Holding(*(rows.take(part) for part in parts))
