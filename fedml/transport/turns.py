"""Turns: at most so many transfers move at a time, and nobody waits for ever.

Each that moves takes some memory, so their number is bounded. Who must wait does so in the order
of coming, and holds nothing. A turn is for moving: who keeps us waiting has it taken away until
there is something to move again, so slow peers, however many, do not stand in the way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fedml.transport.flow import PATIENCE, soon

T = TypeVar("T")

SLOW = 0.2  # seconds for one chunk after which a peer counts as slow: below 42 Mbit/s
BEAT = PATIENCE / 4  # seconds after which one who waits for a turn is told to go on waiting


class Turns:
    """Gives `many` turns at a time."""

    def __init__(self, many: int) -> None:
        self._free = asyncio.Semaphore(many)  # first come, first served

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Give a turn, to be awaited, which is over when the block is left."""
        turn = Turn(self._free)
        try:
            yield turn
        finally:
            turn.give_back()


class Turn:
    """One transfer's leave to move."""

    def __init__(self, free: asyncio.Semaphore) -> None:
        self._free, self.mine = free, False

    async def waits(self) -> AsyncGenerator[None]:
        """Yield now and then while it is not our turn; it is when this ends."""
        if not self._free.locked():
            await self._take()
            return
        taking = asyncio.ensure_future(self._take())  # one wait: each keeps its place in the row
        try:
            while not (await asyncio.wait([taking], timeout=BEAT))[0]:
                yield
        finally:
            taking.cancel()

    async def over(self, items: AsyncIterator[T]) -> AsyncGenerator[T]:
        """Yield what a peer sends; raises `Unreachable` after `PATIENCE` seconds of silence."""
        while True:
            with self.lent():
                item = await soon(items, PATIENCE)
            if item is None:
                return
            await self._take()
            yield item

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Give the turn back if what is done in the block, which waits for a peer, takes long."""
        timer = asyncio.get_running_loop().call_later(SLOW, self.give_back)
        try:
            yield
        finally:
            timer.cancel()

    async def _take(self) -> None:
        if not self.mine:
            await self._free.acquire()
            self.mine = True

    def give_back(self) -> None:
        """Let another have the turn."""
        if self.mine:
            self.mine = False
            self._free.release()
