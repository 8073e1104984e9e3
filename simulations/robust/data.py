"""Scikit-learn's digits at honest sites, and guests that bring no rows of their own.

Who lies so takes no rows from the others: what is lost is lost to the lies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import IID, Data, Dirichlet
from simulations.privacy.data import shipped


@dataclass(frozen=True)
class Sites:
    """`hosts` sites of equal size, and `guests` with copies of the first hosts' rows.

    `alpha` is how alike the hosts' labels are, as in `Dirichlet`; 0 deals rows out at random. The
    guests are called guest-0 and so on.
    """

    hosts: int = 8
    guests: int = 2
    alpha: float = 0.0
    seed: int = 0

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal the digits out; `data` is not needed."""
        if not 0 <= self.guests <= self.hosts:
            raise ConfigError(f"population.guests {self.guests}: 0 to population.hosts")
        of_hosts = Dirichlet(self.hosts, self.alpha, self.seed)
        population = of_hosts if self.alpha else IID(self.hosts, self.seed)
        dealt = dict(population.deal(recipe, _Digits()))
        copies = [*dealt.values()][: self.guests]
        return {**dealt, **{SiteId(f"guest-{k}"): one for k, one in enumerate(copies)}}


class _Digits:
    def rows(self, recipe: Recipe) -> Rows:
        """Return pixels, brought from 0 to 16 to 0 to 1, and the digits."""
        pixels, digits = shipped("digits")
        return Rows(torch.from_numpy(pixels / 16).float(), torch.from_numpy(digits).long())
