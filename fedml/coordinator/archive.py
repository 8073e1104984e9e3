"""The registry and the release repository have one writer: a thread of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from fedml.releases.registry import Registry

T = TypeVar("T")


class Archive:
    """The registry and the release repository behind one thread: one writer, never the loop's.

    `open_registry` takes seconds; it is called in that thread, with the first work that needs it.
    """

    def __init__(self, open_registry: Callable[[], Registry]) -> None:
        self._open, self._registry = open_registry, None
        self._thread = ThreadPoolExecutor(1, "archive")

    _registry: Registry | None

    async def do(self, work: Callable[[Registry], T]) -> T:
        """Run blocking `work` on the registry; calls go one after another."""

        def act() -> T:
            self._registry = self._registry or self._open()
            return work(self._registry)

        return await asyncio.get_running_loop().run_in_executor(self._thread, act)

    async def sign(self, work: Callable[[], T]) -> T:
        """Run blocking `work` on the release repository alone, in the same thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
