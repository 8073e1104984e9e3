"""Populations whose sites have unlike numbers of rows, drawn at random."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population.data import Data, needed
from fedml.simulation.population.split import Indices, Split

Weights = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PowerLaw:
    """The k-th largest site has rows in proportion to k^-exponent, beyond its `least`.

    Source: sizes follow a power law in Li et al. 2020 (FedProx), arXiv:1812.06127, section 5.1.
    """

    sites: int
    exponent: float = 1.0
    least: int = 2
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal `data` out; which site is the k-th largest is drawn."""
        _check("exponent", self.exponent, self.exponent >= 0)
        ranks = np.arange(1, max(self.sites, 0) + 1, dtype=np.float64)
        weights = np.random.default_rng([self.seed, 1]).permutation(ranks**-self.exponent)
        return _deal(self, weights, recipe, data)


@dataclass(frozen=True)
class LogNormal:
    """Sizes in proportion to exp(spread * z), z standard normal, beyond each site's `least`.

    Source: the code of Li et al. 2020 (FedProx), arXiv:1812.06127, where `spread` is 2.
    """

    sites: int
    spread: float = 1.0
    least: int = 2
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal `data` out."""
        _check("spread", self.spread, self.spread >= 0)
        normal = np.random.default_rng([self.seed, 1]).standard_normal(max(self.sites, 0))
        return _deal(self, np.exp(self.spread * normal), recipe, data)


@dataclass(frozen=True)
class DirichletSizes:
    """Sizes in proportion to one draw of a Dirichlet(alpha), beyond each site's `least`.

    The smaller `alpha`, the more unlike. Source: "quantity skew" of Li et al. 2022 (NIID-Bench),
    arXiv:2102.02079, section 4.3.
    """

    sites: int
    alpha: float = 0.5
    least: int = 2
    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal `data` out."""
        _check("alpha", self.alpha, self.alpha > 0)
        random = np.random.default_rng([self.seed, 1])
        return _deal(self, random.dirichlet([self.alpha] * max(self.sites, 0)), recipe, data)


def apportion(rows: int, weights: Weights, least: int, what: str = "") -> Indices:
    """Return sizes that add up to `rows`: `least` each, the rest in proportion to `weights`.

    Raises `ConfigError`, which begins with `what`, if `rows` are too few for that.
    """
    if least < 1:
        raise ConfigError(f"population.least {least}: each site needs 1 row or more")
    spare = rows - least * len(weights)
    if len(weights) < 1 or spare < 0:
        raise ConfigError(
            f"{what}{rows} rows cannot go to {len(weights)} sites of at least {least}; "
            "lower sites or least"
        )
    total = weights.sum()
    shares = weights / total if total > 0 else np.full(len(weights), 1 / len(weights))
    edges = np.round(np.cumsum(shares) * spare).astype(np.int64)
    edges[-1] = spare  # whatever rounding did
    return np.diff(edges, prepend=0) + least


def _deal(
    settings: PowerLaw | LogNormal | DirichletSizes,
    weights: Weights,
    recipe: Recipe,
    data: Data | None,
) -> Mapping[SiteId, Holding]:
    rows = needed(data).rows(recipe)
    sizes = apportion(len(rows), weights, settings.least)
    shuffled = np.random.default_rng(settings.seed).permutation(len(rows))
    parts = np.split(shuffled, np.cumsum(sizes)[:-1])
    return Split(rows, parts, held_out=settings.held_out, seed=settings.seed)


def _check(name: str, value: float, fits: bool) -> None:
    if not (fits and math.isfinite(value)):
        raise ConfigError(
            f"population.{name} {value}: must be {'above 0' if name == 'alpha' else '0 or more'}"
        )
