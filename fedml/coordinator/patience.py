"""What a coordinator cannot do now it does when it can: a registry may be away, a disk full."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fedml.errors import Unreachable

T = TypeVar("T")
_FIRST, _LAST = 0.2, 8.0  # seconds between tries


async def insist(work: Callable[[], Awaitable[T]], waiting: Callable[[str], None]) -> T:
    """Do `work`, again and again for as long as it raises `Unreachable`; other errors pass.

    `waiting` is told each reason as the wait for the next try begins, and "" once it is over.
    """
    wait = 0.0
    while True:
        try:
            result = await work()
        except Unreachable as error:
            wait = min(2 * wait or _FIRST, _LAST)
            waiting(str(error))
            await asyncio.sleep(wait)
        else:
            if wait:
                waiting("")
            return result
