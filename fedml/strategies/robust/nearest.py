"""Rules that choose among updates by how near they are to their nearest others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedml.strategies.robust import gram as grams
from fedml.strategies.robust.cohort import Matrix, Vector
from fedml.strategies.robust.coordinatewise import around_median
from fedml.strategies.robust.rule import Rule


@dataclass(frozen=True, kw_only=True)
class MultiKrum(Rule):
    """The mean of the n - f updates that are nearest to their n - f - 2 nearest others.

    Source: Blanchard et al. 2017 (Krum), arXiv:1703.02757, sections 4 and 5.
    """

    @property
    def least(self) -> int:
        """2f + 3, by the paper's proposition."""
        return 2 * self.f + 3

    @property
    def compares(self) -> bool:
        """True: it is all about distances."""
        return True

    def mix(self, gram: Matrix, even: Vector) -> Matrix:
        """Return the mean of the best; of equally good ones the first counts."""
        return _mean_of_best(gram, self.f, len(gram) - self.f)


@dataclass(frozen=True, kw_only=True)
class Krum(MultiKrum):
    """The one update that is nearest to its n - f - 2 nearest others.

    Source: Blanchard et al. 2017, arXiv:1703.02757, section 4.
    """

    def mix(self, gram: Matrix, even: Vector) -> Matrix:
        """Return the best; of equally good ones the first."""
        return _mean_of_best(gram, self.f, 1)


@dataclass(frozen=True, kw_only=True)
class Bulyan(Rule):
    """Of the n - 2f updates that Krum chooses, each element's mean of the n - 4f around its median.

    Source: El Mhamdi et al. 2018, arXiv:1802.07927, section 4.
    """

    @property
    def least(self) -> int:
        """4f + 3, by the paper."""
        return 4 * self.f + 3

    @property
    def compares(self) -> bool:
        """True: it begins with Krum."""
        return True

    def mix(self, gram: Matrix, even: Vector) -> Matrix:
        """Return the updates that Krum chooses one after the other."""
        return np.eye(len(gram))[grams.bulyan(gram, self.f)]

    def fold(self, rows: Matrix) -> tuple[Vector, Vector]:
        """Return the means around the medians; a row counts where it is among the nearest."""
        return around_median(rows, len(rows) - 2 * self.f)


def _mean_of_best(gram: Matrix, f: int, many: int) -> Matrix:
    best = np.argsort(grams.krum(gram, f), kind="stable")[:many]
    weights = np.zeros((1, len(gram)))
    weights[0, best] = 1 / many
    return weights
