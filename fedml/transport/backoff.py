"""How long a site, or a region, waits before it dials again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Seconds between attempts, without end: doubled from `first` to `last`, less up to a half.

    The jitter keeps a consortium's sites from coming back all at once. `last` stays below the
    10 s within which a run goes on once its coordinator is back.
    """

    first: float = 0.2
    last: float = 8.0

    def __iter__(self) -> Iterator[float]:
        wait = self.first
        while True:
            yield wait * random.uniform(0.5, 1.0)
            wait = min(wait * 2, self.last)
