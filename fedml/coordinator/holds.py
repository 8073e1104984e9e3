"""Who still needs a blob: equal models and updates have one blob, whichever runs they belong to."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from fedml.params import Params, pieces
from fedml.protocol.messages import Blob
from fedml.transport.chunks import BlobStore, Piece


class Holds:
    """A store whose blobs go when the last of those who hold them lets go."""

    def __init__(self, store: BlobStore) -> None:
        self.store = store
        self._count: Counter[str] = Counter()

    async def put(self, parts: Mapping[str, Params]) -> Blob:
        """Store what `parts` encode to as one blob, and hold it."""
        known = parts[""].digest() if parts.keys() == {""} and "digest" in parts[""].known else ""
        return await self.put_pieces(partial(pieces, parts), known, to_last=True)

    async def put_pieces(
        self, make: Callable[[], Iterable[Piece]], digest: str = "", *, to_last: bool = False
    ) -> Blob:
        """Store what `make` returns, as often as it is asked, as one blob, and hold it."""
        while True:
            put = partial(self.store.put_pieces, make(), digest, to_last=to_last)
            blob = await asyncio.to_thread(put)
            self.hold(blob.digest)
            if self.store.has(blob.digest):  # else another let go of it just before we held it
                return blob
            self._count[blob.digest] -= 1

    def hold(self, digest: str) -> None:
        """Keep a blob, if it is there, until `let_go` was called as often as this."""
        self._count[digest] += 1

    def let_go(self, digest: str) -> None:
        """Need a blob no longer."""
        self._count[digest] -= 1
        self.discard(digest)

    def discard(self, digest: str) -> None:
        """Delete a blob unless somebody holds it; who sends an equal one may go on."""
        if self._count[digest] <= 0:
            del self._count[digest]
            self.store.drop(digest)
