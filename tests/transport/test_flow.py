"""A blob on its way out: read once for all who send it, with or without a wait for the disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from fedml.protocol import codec
from fedml.protocol.codec import MAX_CHUNK
from fedml.protocol.requests import Chunk
from fedml.transport import flow
from fedml.transport.chunks import BlobStore
from fedml.transport.flow import Recent, pour

DATA = os.urandom(3 * MAX_CHUNK + 1000)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore.in_transit(tmp_path, 2**30)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with the offset of each read."""
    offsets: list[int] = []

    def counted(read: Callable[..., object], place: int) -> Callable[..., object]:
        def go(*arguments: int) -> object:
            offsets.append(arguments[place])
            return read(*arguments)

        return go

    for name in ("preadv", "pread"):
        monkeypatch.setattr(os, name, counted(getattr(os, name), 2))
    return offsets


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all chunks be of one size, however slow this machine."""
    monkeypatch.setattr(flow, "_FIRST", MAX_CHUNK)
    monkeypatch.setattr(flow, "next_size", lambda size, seconds: size)


async def poured(store: BlobStore, digest: str, recent: Recent | None, start: int = 0) -> bytes:
    async with aclosing(pour(store, digest, start, recent)) as chunks:
        return b"".join([bytes(chunk.data) async for chunk in chunks])


async def test_sites_that_download_at_one_pace_read_each_chunk_once(
    store: BlobStore, reads: list[int], steady: None
) -> None:
    digest, recent = store.put_bytes(DATA).digest, Recent()
    with recent.used():
        first, second = (pour(store, digest, 0, recent) for _ in range(2))
        async with aclosing(first), aclosing(second):
            pairs = [(one, await anext(second)) async for one in first]
    assert b"".join(bytes(one.data) for one, _ in pairs) == DATA
    assert all(codec.encode(one) is codec.encode(other) for one, other in pairs)  # written once
    assert len(reads) == len(set(reads))


async def test_what_was_read_goes_with_the_last_who_sends_and_is_never_much(
    store: BlobStore, reads: list[int], steady: None
) -> None:
    digest, recent = store.put_bytes(DATA).digest, Recent(2)
    with recent.used():
        assert await poured(store, digest, recent) == DATA
        assert recent.get(digest, 0, MAX_CHUNK) is None
        assert recent.get(digest, 2 * MAX_CHUNK, MAX_CHUNK) is not None
        with recent.used():
            pass
        assert recent.get(digest, 2 * MAX_CHUNK, MAX_CHUNK) is not None
    assert recent.get(digest, 2 * MAX_CHUNK, MAX_CHUNK) is None


async def test_one_who_resumes_anywhere_gets_the_rest(store: BlobStore) -> None:
    digest, recent = store.put_bytes(DATA).digest, Recent()
    with recent.used():
        for start in (0, 1, MAX_CHUNK, MAX_CHUNK + 7, len(DATA), 0):
            assert await poured(store, digest, recent, start) == DATA[start:]


@pytest.mark.parametrize("kind", [errno.EAGAIN, errno.EOPNOTSUPP])
async def test_what_is_not_in_memory_is_waited_for_elsewhere(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, kind: int
) -> None:
    def preadv(*_: object) -> int:
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(os, "preadv", preadv)
    digest = store.put_bytes(DATA).digest
    assert await poured(store, digest, None) == DATA
    assert await poured(store, digest, Recent()) == DATA


def test_a_framed_chunk_is_what_a_chunk_is() -> None:
    for data in (b"", b"x", DATA[:MAX_CHUNK]):
        chunk = codec.framed(data)
        assert bytes(chunk.data) == data
        assert codec.encode(chunk) == codec.encode(Chunk(data))
        assert codec.encode_part(chunk) == codec.encode_part(Chunk(data))
