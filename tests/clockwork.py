"""Stories with a clock of their own: nothing in them waits, and no machine is too slow for them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine


class Clockwork(asyncio.SelectorEventLoop):
    """A loop whose time is nobody's but its own: when all wait, it jumps to what is due next."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        due = [timer.when() for timer in self._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        if due and not self._ready:  # type: ignore[attr-defined]
            self.now = max(self.now, min(due))
        super()._run_once()  # type: ignore[misc]


def play(story: Coroutine[None, None, None]) -> float:
    """Play a story to its end; return how long it took by its own clock."""
    with asyncio.Runner(loop_factory=Clockwork) as runner:
        runner.run(story)
        return runner.get_loop().time()
