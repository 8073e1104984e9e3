"""How release metadata and bundles are asked for over a link, by code that blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from fedml.errors import ConfigError
from fedml.protocol.messages import Blob
from fedml.transport.chunks import BlobStore
from fedml.transport.link import Link

T = TypeVar("T")
FIRST_ROOT = "1.root.json"
_ROOT_LIMIT = 2**20


async def first_root(link: Link) -> bytes:
    """Return the release metadata that whoever joins trusts from that day on."""
    return await link.fetch(FIRST_ROOT, _ROOT_LIMIT)


class Fetching:
    """Calls over `link` in `loop`, to be made in another thread; both raise as the link does."""

    def __init__(self, link: Link, loop: asyncio.AbstractEventLoop, store: BlobStore) -> None:
        self._link, self._loop, self._store = link, loop, store

    def fetch(self, name: str, limit: int) -> bytes | None:
        """Return a small named file, None if there is none."""
        try:
            return self._wait(self._link.fetch(name, limit))
        except ConfigError:
            return None

    def download(self, blob: Blob) -> Path:
        """Return where a released file lies, which is in the store from now on."""
        self._wait(self._link.download(blob, self._store))
        return self._store.path(blob.digest)

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
