"""Adult's people at nine offices of 7 to 22,696, by workclass or by chance."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from simulations.adult.data import TEST, TRAIN, Workclasses
from simulations.download import find


@dataclass(frozen=True)
class Offices:
    """The workclasses of `simulations.adult`, or `alike`: of the same sizes, drawn by `seed`."""

    alike: bool = False
    seed: int = 0

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal out all rows; `data` is not needed."""
        offices = Workclasses().deal(recipe, data)
        if not self.alike:
            return offices
        trains, tests = (
            self._drawn(rows, [len(getattr(one, part)) for one in offices.values()])
            for rows, part in zip(pooled(recipe), ("train", "held_out"), strict=True)
        )
        return {
            site: Holding(train, test)
            for site, train, test in zip(offices, trains, tests, strict=True)
        }

    def _drawn(self, rows: Rows, sizes: Sequence[int]) -> list[Rows]:
        order = np.random.default_rng(self.seed).permutation(len(rows))
        parts = np.split(order, list(itertools.accumulate(sizes))[:-1])
        return [rows.take(part.tolist()) for part in parts]


def pooled(recipe: Recipe) -> tuple[Rows, Rows]:
    """Return all rows to train on, and all to test with."""
    return recipe.read(find(TRAIN)), recipe.read(find(TEST))
