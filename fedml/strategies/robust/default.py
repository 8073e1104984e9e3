"""The rule to take if nothing speaks for another."""

from __future__ import annotations

from dataclasses import dataclass

from fedml.strategies.base import Reduction
from fedml.strategies.robust.coordinatewise import TrimmedMean


@dataclass(frozen=True, kw_only=True)
class Robust:
    """ARC, then nearest neighbour mixing, then the trimmed mean.

    Settings are those of `TrimmedMean`, and checked there.
    """

    f: int = 1
    clip: float = 10.0

    def __post_init__(self) -> None:
        self._rule()

    def _rule(self) -> TrimmedMean:
        return TrimmedMean(f=self.f, clip=self.clip, before=("arc", "nnm"))

    @property
    def linear(self) -> bool:
        """False: it looks at single updates."""
        return False

    @property
    def least(self) -> int:
        """2f + 1: the honest must be more than the others."""
        return self._rule().least

    def start(self) -> Reduction:
        """Begin a round's reduction."""
        return self._rule().start()
