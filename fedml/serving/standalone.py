"""`fedml serve DIR`: a shelf served by a process of its own, following every change on it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import structlog

from fedml.errors import ConfigError
from fedml.releases.shelf import POINTER, Shelf
from fedml.serving.engine import Engine
from fedml.serving.faces import Access, Server
from fedml.serving.oip import Limits

PERIOD = 0.25  # seconds between looks at the shelf
_log = structlog.get_logger(__name__)


def run(
    shelf_folder: Path,
    rest_port: int | None = 8000,
    grpc_port: int | None = 8001,
    host: str = "127.0.0.1",
    access: Access | None = None,
    limits: Limits | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is in flight and return.

    Raises `ConfigError` if the folder does not exist or a port is taken.
    """
    if not shelf_folder.is_dir():
        raise ConfigError(f"shelf {shelf_folder} does not exist; is the folder right?")

    async def main() -> None:
        stop = asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        engine = Engine(Shelf(shelf_folder), limits)
        try:
            await engine.refresh()
            async with Server(engine, rest_port, grpc_port, host, access) as server:
                _log.info(
                    "serving",
                    rest_port=server.rest_port,
                    grpc_port=server.grpc_port,
                    models=[f"{s.model}/{s.version} {s.state}" for s in engine.serving()],
                )
                await follow(engine, shelf_folder, stop)
        finally:
            await engine.close()

    asyncio.run(main())


async def follow(
    engine: Engine,
    shelf_folder: Path,
    stop: asyncio.Event,
    changed: Callable[[], None] = lambda: None,
) -> None:
    """Refresh `engine` within a second of any change of a pointer, until `stop` is set.

    A refused release is tried again only after the next change. `changed` is called after each
    refresh.
    """
    seen = await asyncio.to_thread(_signature, shelf_folder)
    await engine.refresh()  # what changed before the first look
    changed()
    while not stop.is_set():
        try:
            async with asyncio.timeout(PERIOD):
                await stop.wait()
        except TimeoutError:
            now = await asyncio.to_thread(_signature, shelf_folder)
            if now != seen:
                seen = now
                await engine.refresh()
                changed()


def _signature(shelf_folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in shelf_folder.glob(f"*/{POINTER}"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # taken off the shelf between two looks
        found[path.parent.name] = (status.st_ino, status.st_mtime_ns)
    return found
