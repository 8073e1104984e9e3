"""Rules that look for a centre of all updates, found from their inner products alone."""

from __future__ import annotations

from dataclasses import dataclass

from fedml.strategies.base import check_setting
from fedml.strategies.robust import gram as grams
from fedml.strategies.robust.cohort import Matrix, Vector
from fedml.strategies.robust.rule import Rule


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Rule):
    """The point that has the least sum of distances from all updates, found to within `nu`.

    `by_weight` weighs distances by the weights that sites claim, as the paper does with their
    row counts: only where these are trusted, for a liar may claim any.
    Source: Pillutla et al. 2019 (RFA), arXiv:1912.13445, algorithm 2.
    """

    nu: float = 1e-6
    iterations: int = 100
    by_weight: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("GeometricMedian.nu", self.nu, open_=True)
        check_setting("GeometricMedian.iterations", self.iterations, least=1, below=1001)

    @property
    def compares(self) -> bool:
        """True: it is all about distances."""
        return True

    def even(self, weights: Vector) -> Vector:
        """Return equal shares, or with `by_weight` those of the weights claimed."""
        return weights / weights.sum() if self.by_weight else super().even(weights)

    def mix(self, gram: Matrix, even: Vector) -> Matrix:
        """Return the median's weights."""
        return grams.geometric_median(gram, even, self.nu, self.iterations)[None, :]


@dataclass(frozen=True, kw_only=True)
class CentredClipping(Rule):
    """Zero, moved again and again by the mean of what leads to the updates, each clipped to `tau`.

    With `tau` 0 the radius is the median distance, which a minority cannot move far.
    Source: Karimireddy et al. 2021, arXiv:2012.10333, equation 3; its centre is the last
    aggregate at first, ours is none, so that a round depends on its updates alone.
    """

    tau: float = 0.0
    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("CentredClipping.tau", self.tau)
        check_setting("CentredClipping.iterations", self.iterations, least=1, below=1001)

    @property
    def compares(self) -> bool:
        """True: it is all about distances."""
        return True

    def mix(self, gram: Matrix, even: Vector) -> Matrix:
        """Return the centre's weights."""
        return grams.centred_clipping(gram, self.tau, self.iterations)[None, :]
