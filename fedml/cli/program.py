"""How long-lived programs start and stop: logs set up, SIGTERM and Ctrl-C both end them cleanly."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable


def serve_forever(program: Callable[[], Awaitable[None]]) -> None:
    """Run an async program until it returns, fails or is told to stop.

    SIGTERM ends it with status 0, as service managers expect; Ctrl-C raises KeyboardInterrupt.
    """
    from fedml.telemetry import configure_logging

    configure_logging(verbose=bool(os.environ.get("FEDML_VERBOSE")))
    asyncio.run(_until_told(program))


async def _until_told(program: Callable[[], Awaitable[None]]) -> None:
    task = asyncio.ensure_future(program())
    told = False

    def stop() -> None:
        nonlocal told
        told = True
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not told:
            raise
