"""How long-lived programs start and stop: logs set up, SIGTERM and Ctrl-C both end them cleanly."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Protocol


class Program(Protocol):
    """What runs until it is told to stop."""

    async def run(self) -> None:
        """Serve until cancelled."""

    async def drain(self) -> None:
        """Begin nothing further; finish, or put by, what is under way, in bounded time."""


def serve_forever(program: Program) -> None:
    """Run a program until it fails or is told to stop.

    SIGTERM lets it drain and ends it with status 0, as service managers expect; a second one ends
    it at once. Ctrl-C ends it at once too, and raises KeyboardInterrupt.
    """
    from fedml.telemetry import configure_logging

    configure_logging(verbose=bool(os.environ.get("FEDML_VERBOSE")))
    asyncio.run(_until_told(program))


async def _until_told(program: Program) -> None:
    running = asyncio.create_task(program.run())
    leaving: asyncio.Task[None] | None = None

    async def leave() -> None:
        try:
            await program.drain()
        finally:
            running.cancel()

    def told() -> None:
        nonlocal leaving
        if leaving is None:
            leaving = asyncio.create_task(leave())
        else:
            running.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told)
    try:
        await running
    except asyncio.CancelledError:
        us = asyncio.current_task()
        if leaving is None or (us is not None and us.cancelling()):  # Ctrl-C, whatever else
            raise
    if leaving is not None:
        leaving.cancel()
        await asyncio.wait([leaving])
        if not leaving.cancelled():
            leaving.result()
