"""Scikit-learn's digits at sites that are unlike in their labels, and score the same test rows.

So the figures do not depend on who scores a model: under `fedbuff` those do that do not train.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data, Dirichlet
from simulations.privacy.data import shipped

_TEST = 5  # one row in five


@dataclass(frozen=True)
class Sites:
    """`sites` sites; `alpha` is how alike their labels are, as in `Dirichlet`."""

    sites: int = 10
    alpha: float = 1.0
    seed: int = 0

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal the training digits out; `data` is not needed."""
        pixels, labels = shipped("digits")
        x, y = torch.from_numpy(pixels / 16).float(), torch.from_numpy(labels).long()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(self.seed))
        test, train = order[: len(y) // _TEST], order[len(y) // _TEST :]
        population = Dirichlet(self.sites, self.alpha, self.seed, held_out=0.0)
        dealt = population.deal(recipe, _Heap(Rows(x[train], y[train])))
        scored = Rows(x[test], y[test])
        return {site: Holding(one.train, scored) for site, one in dealt.items()}


@dataclass(frozen=True)
class _Heap:
    found: Rows

    def rows(self, recipe: Recipe) -> Rows:
        """Return the rows as they are."""
        return self.found
