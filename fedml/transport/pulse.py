"""Signs of life: how long a peer may say nothing before it counts as gone.

On a slow line its words wait behind the bytes of a transfer, so each piece of one that comes is a
sign of life as good as a word, and the next piece may take as long as it needs at the same pace.
Only what comes counts: what we send says nothing about the peer.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import suppress
from typing import TypeVar

from fedml.errors import Unreachable
from fedml.protocol.codec import MAX_CHUNK
from fedml.protocol.requests import Chunk
from fedml.transport.flow import GROWTH, PATIENCE

T = TypeVar("T")

TRICKLE = 1024.0  # bytes a second; a transfer that is slower is no sign of life


def leave(size: int, seconds: float) -> float:
    """Return for how long a peer may be silent after a piece of `size` bytes that took `seconds`.

    That is twice what the largest piece that may follow takes at the same pace, and never more
    than `PATIENCE`; 0 after one that only trickled in.
    """
    if size < TRICKLE * seconds or not size:
        return 0.0
    return min(2 * seconds * min(GROWTH * size, MAX_CHUNK) / size, PATIENCE)


class Pulse:
    """When the peer of one connection must have been heard again."""

    def __init__(self) -> None:
        self.silence = 0.0  # seconds that it may be silent, from its last sign of life on
        self._usual = 0.0
        self._until = 0.0  # loop time; up to then a transfer may keep its words waiting
        self._bound: asyncio.Timeout | None = None

    async def next(self, word: Awaitable[T], silence: float) -> T:
        """Return the peer's next `word`; `TimeoutError` after `silence` seconds without a sign."""
        self._usual = silence
        try:
            async with asyncio.timeout_at(self._due()) as self._bound:
                return await word
        finally:
            self._bound = None

    async def of(self, chunks: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk]:
        """Yield what comes of a transfer, heeding each piece as a sign of life."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async for chunk in chunks:
            if seconds := leave(len(chunk.data), loop.time() - began):
                self._heed(seconds)
            yield chunk
            began = loop.time()

    def _heed(self, seconds: float) -> None:
        self._until = max(self._until, asyncio.get_running_loop().time() + seconds)
        if self._bound is not None:
            with suppress(RuntimeError):  # the bound has passed, and its waiter is on the way out
                self._bound.reschedule(self._due())

    def _due(self) -> float:
        now = asyncio.get_running_loop().time()
        self.silence = max(self._usual, self._until - now)
        return now + self.silence


async def heard(pulse: Pulse, word: Awaitable[T], silence: float) -> T:
    """Return what `pulse.next` does, with `Unreachable` for its silence."""
    try:
        return await pulse.next(word, silence)
    except TimeoutError as error:
        raise Unreachable(f"the coordinator was silent for {pulse.silence:g} s") from error
