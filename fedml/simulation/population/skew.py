"""Populations that differ in their labels, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.recipes.partition import dirichlet_label_skew
from fedml.simulation.executors.base import Holding
from fedml.simulation.population.data import Data, needed
from fedml.simulation.population.quantity import apportion
from fedml.simulation.population.split import Indices, Split


class Population(Protocol):
    """A way to make sites."""

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Return each site's rows; the same for the same settings."""


@dataclass(frozen=True)
class IID:
    """`sites` sites of equal size with rows drawn at random; `held_out` is the scored share."""

    sites: int
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal `data` out like cards."""
        rows = needed(data).rows(recipe)
        if not 1 <= self.sites <= len(rows):
            raise ConfigError(f"{len(rows)} rows cannot go to {self.sites} sites; lower sites")
        shuffled = np.random.default_rng(self.seed).permutation(len(rows))
        parts = np.array_split(shuffled, self.sites)
        return Split(rows, parts, held_out=self.held_out, seed=self.seed)


@dataclass(frozen=True)
class Dirichlet:
    """`sites` sites of equal size, each with a label mixture of its own.

    `alpha` 100 and all are alike, 0.1 and most see a single label; see `dirichlet_label_skew`.
    Source: Hsu, Qi & Brown 2019, arXiv:1909.06335, section 3.1.
    """

    sites: int
    alpha: float = 0.5
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal `data` out with label skew."""
        rows = needed(data).rows(recipe)
        parts = dirichlet_label_skew(labels_of(rows), self.sites, self.alpha, self.seed)
        return Split(rows, parts, held_out=self.held_out, seed=self.seed)


@dataclass(frozen=True)
class Shards:
    """Rows sorted by label, cut into sites * per_site equal shards; each site gets `per_site`.

    With 2 shards most sites see two labels. `drop_rest` leaves out, at random, the rows that do
    not fill a shard; else rows that do not divide are refused.
    Source: McMahan et al. 2017, arXiv:1602.05629, section 3.
    """

    sites: int
    per_site: int = 2
    drop_rest: bool = False
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal `data` out by the shard."""
        rows = needed(data).rows(recipe)
        shards, random = self.sites * self.per_site, np.random.default_rng(self.seed)
        if self.sites < 1 or not 1 <= shards <= len(rows):
            raise ConfigError(
                f"{len(rows)} rows cannot make {self.sites} sites x {self.per_site} shards; "
                "lower sites or per_site"
            )
        rest = len(rows) % shards
        if rest and not self.drop_rest:
            raise ConfigError(
                f"{len(rows)} rows do not make {self.sites} x {self.per_site} equal shards: {rest} "
                "are left over; set population.drop_rest=true to leave them out"
            )
        used = random.permutation(len(rows))[rest:]
        heap = used[np.argsort(labels_of(rows)[used], kind="stable")].reshape(shards, -1)
        parts = list(heap[random.permutation(shards)].reshape(self.sites, -1))
        notes = [f"{rest} of {len(rows)} rows fill no shard and are left out"] if rest else []
        return Split(rows, parts, held_out=self.held_out, seed=self.seed, notes=notes)


@dataclass(frozen=True)
class FewLabels:
    """Each site sees `labels` labels; a label's rows are shared by the sites that see it.

    Shares are log-normal of deviation `spread`, 0 for equal ones, and at least `least` rows each.
    Sources: "#C = k" of Li et al. 2022 (NIID-Bench), arXiv:2102.02079, section 4.1; with 2 labels
    and unlike sizes it is the MNIST of FedProx, Li et al. 2020, arXiv:1812.06127, appendix C.1.
    """

    sites: int
    labels: int = 2
    spread: float = 0.0
    least: int = 1
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal `data` out label by label."""
        rows = needed(data).rows(recipe)
        values, codes = np.unique(labels_of(rows), return_inverse=True)
        if self.sites < 1 or not 1 <= self.labels <= len(values):
            raise ConfigError(
                f"population: {self.sites} sites with {self.labels} labels each, and the data "
                f"have {len(values)} labels; lower labels"
            )
        if self.sites * self.labels < len(values):
            raise ConfigError(
                f"population: {self.sites} sites x {self.labels} labels leave some of the "
                f"{len(values)} labels to nobody; raise one of them"
            )
        random = np.random.default_rng(self.seed)
        seen = self._assign(len(values), random)
        parts: list[list[Indices]] = [[] for _ in range(self.sites)]
        for code in range(len(values)):
            heap = random.permutation(np.flatnonzero(codes == code))
            owners = np.flatnonzero(seen[:, code])
            weights = np.exp(self.spread * random.standard_normal(len(owners)))
            sizes = apportion(len(heap), weights, self.least, f"label {values[code]}: ")
            for owner, part in zip(owners, np.split(heap, np.cumsum(sizes)[:-1]), strict=True):
                parts[owner].append(part)
        joined = [np.sort(np.concatenate(part)) for part in parts]
        return Split(rows, joined, held_out=self.held_out, seed=self.seed)

    def _assign(self, values: int, random: np.random.Generator) -> np.typing.NDArray[np.bool_]:
        """Return who sees which label [sites, values]: dealt like cards, deck after deck."""
        seen = np.zeros((self.sites, values), dtype=np.bool_)
        deck: list[int] = []
        for site in range(self.sites):
            for _ in range(self.labels):
                fresh = [card for card in deck if not seen[site, card]]
                if not fresh:
                    pack = [int(card) for card in random.permutation(values)]
                    deck, fresh = deck + pack, [card for card in pack if not seen[site, card]]
                seen[site, fresh[0]] = True
                deck.remove(fresh[0])
        return seen


def labels_of(rows: Rows) -> Indices:
    """Return each row's label: its target, or the first of its targets.

    Raises `ConfigError` for targets that are not whole numbers.
    """
    y = rows.y.reshape(len(rows), -1)[:, 0]
    if bool((y != y.round()).any()):
        raise ConfigError(
            "this population goes by labels, and targets are not whole numbers; "
            "try population=iid or one that goes by sizes"
        )
    labels: Indices = y.long().numpy()
    return labels
