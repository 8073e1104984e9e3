"""The post of one run: its models packed once for all sites, its updates unpacked as they come.

A model's own blob is there in any case, for a site that cannot use a parcel: a late joiner lacks
the model before, an older version the word. So what is sent how decides nothing of a run.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection
from functools import partial

from fedml import failpoints
from fedml.coordinator.holds import Holds
from fedml.errors import MalformedUpdate
from fedml.params import Params, read
from fedml.protocol.messages import Assignment, Blob, Parcel, SiteId, Trained
from fedml.protocol.parcels import fits, form_of, pack, unpack
from fedml.protocol.tasks import Brief
from fedml.rounds.plan import Wire
from fedml.strategies import ServerState
from fedml.transport.chunks import BlobStore

Sent = tuple[Blob, tuple[Parcel, ...]]


class Post:
    """Packs and unpacks for one run. What it holds in the store it lets go in `close`."""

    def __init__(self, holds: Holds, wire: Wire) -> None:
        self._holds, self._form = holds, form_of(wire.down)
        self._brief: tuple[Brief, Sent] | None = None
        self._before: Blob | None = None  # what went out last, if deltas are wanted
        self._had: frozenset[SiteId] = frozenset()  # who was sent that

    @property
    def sends_deltas(self) -> bool:
        """True if sites are to keep a model for the next one."""
        return self._form == "delta"

    async def encoded(
        self, brief: Brief, last: tuple[ServerState, Blob] | None, asked: Collection[SiteId]
    ) -> Sent:
        """Encode and pack a round's brief once, whatever the number of sites.

        It is not encoded if it is the state that was committed `last`, which has its blob.
        """
        if self._brief is None or self._brief[0] is not brief:
            self.forget()
            blob = await self._whole(brief, last)
            parcels = list[Parcel]()
            try:
                for form, base in await asyncio.to_thread(self._ways, blob, asked):
                    parcels.append(Parcel(form, await self._packed(blob, form, base), base))
            except BaseException:  # a disk is full: all of it is done again
                self._let_go(blob, *(parcel.blob for parcel in parcels))
                raise
            failpoints.reach("parcel.packed")
            self._let_go(*(parcel.blob for parcel in parcels if parcel.blob.size >= blob.size))
            small = tuple(parcel for parcel in parcels if parcel.blob.size < blob.size)
            self._brief, self._had = (brief, (blob, small)), frozenset(asked)
        return self._brief[1]

    async def _whole(self, brief: Brief, last: tuple[ServerState, Blob] | None) -> Blob:
        if last is None or not _is_all_of(brief, last[0]):
            return await self._holds.put({"": brief.params, **brief.slots})
        self._holds.hold(last[1].digest)
        return last[1]

    def _ways(self, blob: Blob, asked: Collection[SiteId]) -> list[tuple[str, str]]:
        """Return the forms to pack a model in, each with its base, the best first.

        A delta for those who have the model before, and another form if there are others.
        """
        if not self.sends_deltas:
            return [(self._form, "")] if self._form else []
        before, path = self._before, self._holds.store.path
        if before is not None and before == blob:  # who has it needs nothing
            return [] if self._had.issuperset(asked) else [("zstd", "")]
        if before is None or not fits(path(blob.digest), path(before.digest)):
            return [("zstd", "")]
        delta = ("delta", before.digest)
        return [delta] if self._had.issuperset(asked) else [delta, ("zstd", "")]

    async def _packed(self, blob: Blob, form: str, base: str) -> Blob:
        path = self._holds.store.path
        return await self._holds.put_pieces(
            partial(pack, path(blob.digest), form, path(base) if base else None)
        )

    def forget(self) -> None:
        """Let go of a brief that no site needs any more, but for what the next one follows."""
        if self._brief is None:
            return
        blob, parcels = self._brief[1]
        self._brief = None
        self._let_go(*(parcel.blob for parcel in parcels))
        if not self.sends_deltas:
            self._let_go(blob)
            return
        if self._before is not None:
            self._let_go(self._before)
        self._before = blob

    def close(self) -> None:
        """Let go of everything."""
        self.forget()
        if self._before is not None:
            self._let_go(self._before)
            self._before = None

    def _let_go(self, *blobs: Blob) -> None:
        for blob in blobs:
            self._holds.let_go(blob.digest)


def opened(store: BlobStore, order: Assignment, answer: Trained, most: int) -> dict[str, Params]:
    """Return the parts of an update that has come, of `most` bytes at most, as mapped files.

    Raises `MalformedUpdate` for one that is packed otherwise than the order wants it, and
    `MalformedMessage` if it is not what it says, `NoRoom` on a full disk.
    """
    path = store.path(answer.sent.digest)
    if not answer.parcels:
        return read(path)
    parcel, blob = answer.parcels[0], answer.update
    wanted = form_of(order.up)
    if len(answer.parcels) > 1 or parcel.base or parcel.form != wanted:
        got = [parcel.form for parcel in answer.parcels]
        raise MalformedUpdate(f"it comes as {got}, the order wants {wanted or 'it whole'!r}")
    if blob.size > most:
        raise MalformedUpdate(f"its parcel stands for {blob.size} bytes, limit {most}")
    draft = store.folder / f".{secrets.token_hex(8)}.draft"
    unpack(path, parcel.form, blob, draft, written=_written)
    try:
        return read(draft)
    finally:
        draft.unlink()  # it is mapped: its bytes go when nobody looks at them any more


def _written() -> None:
    failpoints.reach("parcel.unpacked")


def _is_all_of(brief: Brief, state: ServerState) -> bool:
    """True if a brief holds the very tensors of a state, and all of them."""
    return (
        brief.params is state.params
        and brief.slots.keys() == state.slots.keys()
        and all(slot is state.slots[name] for name, slot in brief.slots.items())
    )
