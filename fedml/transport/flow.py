"""Blobs in motion: from a store into chunks and back, disk and hash off the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, TypeVar

from fedml import failpoints
from fedml.errors import FedmlError, Unreachable
from fedml.protocol import codec
from fedml.protocol.codec import MAX_CHUNK
from fedml.protocol.requests import Chunk
from fedml.telemetry import BYTES
from fedml.transport.chunks import BlobStore, Intake, Piece

A = TypeVar("A")
T = TypeVar("T")

PATIENCE = 60.0  # seconds of silence within a transfer before it is given up
SLOW = 0.2  # seconds for one chunk after which a peer counts as slow
GROWTH = 4  # how much larger a chunk may be than the one before
_FIRST = 64 * 2**10  # bytes of the first chunk, on a line of which nothing is known
_TARDY = GROWTH * SLOW  # seconds for one chunk after which the next is smaller
_SHARED = 8  # chunks that were read and are kept for others
_AHEAD = 2 * MAX_CHUNK  # bytes that may have come and not be written yet


class Recent:
    """The chunks read last: whoever sends a blob that another just sent need not read it again.

    What is kept goes when the last of those who send lets go.
    """

    def __init__(self, many: int = _SHARED) -> None:
        self._many, self._users = many, 0
        self._chunks: dict[tuple[str, int, int], Chunk] = {}

    @contextmanager
    def used(self) -> Iterator[Recent]:
        """Keep chunks until the block is left, if nobody else uses them then."""
        self._users += 1
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                self._chunks.clear()

    def get(self, digest: str, offset: int, size: int) -> Chunk | None:
        """Return the chunk of at most `size` bytes of a blob from `offset` on, if it is here."""
        return self._chunks.get((digest, offset, size))

    def keep(self, digest: str, offset: int, size: int, chunk: Chunk) -> None:
        """Keep a chunk until so many others came."""
        self._chunks[digest, offset, size] = chunk
        if len(self._chunks) > self._many:
            del self._chunks[next(iter(self._chunks))]


async def pour(
    store: BlobStore, digest: str, offset: int, recent: Recent | None = None
) -> AsyncGenerator[Chunk]:
    """Yield a blob's bytes from `offset` on; with `recent`, chunks that are there are not read.

    Chunks are as large as the line is quick: what else is said on it waits behind a chunk.
    Raises `Refused` if the blob is not there.
    """
    loop, size = asyncio.get_running_loop(), _FIRST
    with store.open(digest) as file:
        while True:
            chunk = recent.get(digest, offset, size) if recent else None
            if chunk is None:
                now = _read_now(file, offset, size)
                data = await _read(file, offset, size) if now is None else now
                if not data:
                    return
                chunk = codec.framed(data) if recent else Chunk(data)
                if recent:
                    recent.keep(digest, offset, size, chunk)
            BYTES.labels("out").inc(len(chunk.data))
            failpoints.reach("chunk.poured")
            began = loop.time()
            yield chunk
            offset += len(chunk.data)
            size = next_size(size, loop.time() - began)


def _read_now(file: BinaryIO, offset: int, size: int) -> memoryview | None:
    """Return a chunk that takes no wait for the disk, None if it might take one.

    What was written a moment ago is in memory, and copying it is quicker than asking a thread.
    """
    flag = getattr(os, "RWF_NOWAIT", None)
    if flag is None:
        return None
    data = bytearray(size)
    try:
        came = os.preadv(file.fileno(), [data], offset, flag)
    except OSError:  # it is not there, or the disk's format does not know the question
        return None
    return memoryview(data)[:came]


async def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    reading = _thread(os.pread, file.fileno(), size, offset)
    try:
        return await asyncio.shield(reading)
    finally:
        await asyncio.wait([reading])  # before the file is closed


def next_size(size: int, seconds: float) -> int:
    """Return the size of the chunk that follows one of `size` bytes, which took `seconds` to go."""
    if seconds < SLOW:
        return min(GROWTH * size, MAX_CHUNK)
    return max(size // GROWTH, _FIRST) if seconds > _TARDY else size


async def catch(chunks: AsyncIterator[Chunk], intake: Intake) -> None:
    """Take all chunks in and verify the blob; what has come is kept whatever happens.

    While some are hashed and written, the next are on their way, but not many. Empty chunks say
    no more than that the peer is there. Raises as `chunks` and `Intake` do.
    """
    came: list[Piece] = []
    writing: asyncio.Future[None] | None = None
    left = intake.blob.size - intake.offset
    try:
        async for chunk in chunks:
            came.append(chunk.data)
            left -= len(chunk.data)
            BYTES.labels("in").inc(len(chunk.data))
            full = sum(map(len, came)) >= _AHEAD
            if left and (writing is None or writing.done() or full):
                if writing is not None:
                    await writing
                writing, came = _thread(intake.write, *came), []
        if writing is not None:
            await writing
        writing, came = _thread(intake.finish, *came), []
        await writing
    finally:
        try:
            if writing is not None:
                await asyncio.wait([writing])
            if came:  # the peer broke off, and what it sent is good; or the intake has had enough
                with suppress(FedmlError):
                    await asyncio.to_thread(intake.write, *came)
        finally:
            intake.close()


def _thread(act: Callable[..., T], *arguments: A) -> asyncio.Future[T]:
    future = asyncio.get_running_loop().run_in_executor(None, act, *arguments)
    future.add_done_callback(_heed)
    return future


def _heed(future: asyncio.Future[T]) -> None:
    """Look at the outcome: a transfer that was cut off waits for it, and asks no more."""
    if not future.cancelled():
        future.exception()


async def soon(items: AsyncIterator[T], patience: float = PATIENCE) -> T | None:
    """Return the next item, None at the end; raises `Unreachable` after `patience` seconds."""
    try:
        async with asyncio.timeout(patience):
            return await anext(items, None)
    except TimeoutError as error:
        raise Unreachable(f"nothing came for {patience:.0f} s") from error


async def patient(items: AsyncIterator[T]) -> AsyncGenerator[T]:
    """Yield the items; raises `Unreachable` after `PATIENCE` seconds without one."""
    while (item := await soon(items)) is not None:
        yield item
