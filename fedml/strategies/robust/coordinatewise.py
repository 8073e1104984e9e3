"""Rules that treat each element by itself: what the middle of the sites say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedml.strategies.robust.cohort import Matrix, Vector
from fedml.strategies.robust.rule import Rule


@dataclass(frozen=True, kw_only=True)
class _ByElement(Rule):
    """A rule that takes each update by itself, whoever is near."""

    def mix(self, gram: Matrix, even: Vector) -> Matrix:
        """Return the updates as they are."""
        return np.eye(len(gram))


@dataclass(frozen=True, kw_only=True)
class Median(_ByElement):
    """The median of each element.

    Source: Yin et al. 2018, arXiv:1803.01498, algorithm 1, option I.
    """

    def fold(self, rows: Matrix) -> tuple[Vector, Vector]:
        """Return medians; a row counts where it is in the middle n - 2f."""
        ranked, n = np.sort(rows, axis=0), len(rows)
        values = (ranked[(n - 1) // 2] + ranked[n // 2]) / 2
        return values, within(rows, ranked, ranked[self.f], ranked[n - 1 - self.f])


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(_ByElement):
    """The mean of each element without the f smallest and the f largest.

    Source: Yin et al. 2018, arXiv:1803.01498, algorithm 1, option II.
    """

    def fold(self, rows: Matrix) -> tuple[Vector, Vector]:
        """Return trimmed means; a row counts where it is not trimmed."""
        ranked, n = np.sort(rows, axis=0), len(rows)
        kept = ranked[self.f : n - self.f]
        return kept.mean(axis=0), within(rows, ranked, kept[0], kept[-1])


@dataclass(frozen=True, kw_only=True)
class MeanAroundMedian(_ByElement):
    """The mean of the n - f values of each element that are nearest to their median.

    Source: Xie et al. 2018 (MeaMed), arXiv:1802.10116, section 4.
    """

    def fold(self, rows: Matrix) -> tuple[Vector, Vector]:
        """Return the means; a row counts where it is among the nearest."""
        return around_median(rows, len(rows) - self.f)


def around_median(rows: Matrix, keep: int) -> tuple[Vector, Vector]:
    """Return the mean of the `keep` values nearest to each element's median, and who counted.

    Of two equally far away, one on each side, the smaller is kept.
    """
    ranked, n = np.sort(rows, axis=0), len(rows)
    middle = (ranked[(n - 1) // 2] + ranked[n // 2]) / 2
    low = np.zeros((1, rows.shape[1]), dtype=np.intp)  # rank of the smallest that is kept
    for dropped in range(n - keep):  # the farther of the two ends, each time
        high = low + (n - 1 - dropped)
        below = middle - np.take_along_axis(ranked, low, axis=0)
        above = np.take_along_axis(ranked, high, axis=0) - middle
        low += below > above
    total = np.zeros(rows.shape[1])
    for rank, values in enumerate(ranked):  # not all less the dropped: those may be huge
        total += np.where((low[0] <= rank) & (rank < low[0] + keep), values, 0.0)
    least = np.take_along_axis(ranked, low, axis=0)[0]
    most = np.take_along_axis(ranked, low + keep - 1, axis=0)[0]
    return total / keep, within(rows, ranked, least, most)


def within(rows: Matrix, ranked: Matrix, least: Vector, most: Vector) -> Vector:
    """Return in how many elements each row lies between `least` and `most`.

    Elements in which all rows are the same say nothing about who differs, and are left out.
    """
    inside = (rows >= least) & (rows <= most) & (ranked[0] < ranked[-1])
    counts: Vector = inside.sum(axis=1, dtype=np.float64)
    return counts
