"""The one reducer of privacy mode `site_central`: a mean of clipped updates, and noise on it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedml.errors import MalformedUpdate
from fedml.privacy.central import drown
from fedml.protocol.tasks import Update
from fedml.strategies.base import Aggregate, Reduction
from fedml.strategies.reducers import WeightedMean

_HAIR = 1e-6  # of the norm


@dataclass(frozen=True)
class NoisyMean:
    """Mean of updates that weigh the same, each of L2 norm `clip` at most, made noisy once.

    The noise on their sum has `noise` times `clip` for its standard deviation, so the mean of n
    has an n-th of that. Neither metrics nor single norms are told, for they are exact.
    """

    clip: float
    noise: float

    @property
    def linear(self) -> bool:
        """True: sums are all it needs."""
        return True

    @property
    def least(self) -> int:
        """One."""
        return 1

    def start(self) -> Reduction:
        """Begin with an empty sum."""
        return _NoisySum(self)


class _NoisySum:
    def __init__(self, terms: NoisyMean) -> None:
        self._terms, self._sum = terms, WeightedMean().start()
        self._total: Aggregate | None = None

    def add(self, update: Update) -> None:
        if update.slots or update.weight != 1:
            raise MalformedUpdate("under site_central an update is a delta of weight 1")
        norm = update.delta.norm()
        if not (math.isfinite(norm) and norm <= self._terms.clip * (1 + _HAIR)):
            raise MalformedUpdate(f"its norm is above privacy.clip {self._terms.clip:g}")
        self._sum.add(replace(update, metrics={}))

    def result(self) -> Aggregate:
        if self._total is None:  # once: two draws over one sum would average out
            mean = self._sum.result()
            std = self._terms.noise * self._terms.clip / mean.weight
            self._total = replace(mean, delta=drown(mean.delta, std))
        return self._total
