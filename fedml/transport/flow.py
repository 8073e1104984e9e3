"""Blobs in motion: from a store into chunks and back, disk and hash off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from typing import TypeVar

from fedml import failpoints
from fedml.errors import FedmlError, Unreachable
from fedml.protocol.codec import MAX_CHUNK
from fedml.protocol.requests import Chunk
from fedml.telemetry import BYTES
from fedml.transport.chunks import BlobStore, Intake, Piece

A = TypeVar("A")
T = TypeVar("T")

PATIENCE = 60.0  # seconds of silence within a transfer before it is given up
SLOW = 0.5  # seconds for one chunk after which a peer counts as slow
GROWTH = 4  # how much larger a chunk may be than the one before
_FIRST = 64 * 2**10  # bytes of the first chunk, on a line of which nothing is known
_TARDY = GROWTH * SLOW  # seconds for one chunk after which the next is smaller
_AHEAD = 2 * MAX_CHUNK  # bytes that may have come and not be written yet


async def pour(store: BlobStore, digest: str, offset: int) -> AsyncGenerator[Chunk]:
    """Yield a blob's bytes from `offset` on, reading ahead by one chunk.

    Chunks are as large as the line is quick: what else is said on it waits behind a chunk.
    Raises `Refused` if the blob is not there.
    """
    file, loop, size = store.open(digest), asyncio.get_running_loop(), _FIRST
    file.seek(offset)
    reading = _thread(file.read, size)
    try:
        while data := await reading:
            if ahead := size == MAX_CHUNK:
                reading = _thread(file.read, size)
            BYTES.labels("out").inc(len(data))
            failpoints.reach("chunk.poured")
            began = loop.time()
            yield Chunk(data)
            size = next_size(len(data), loop.time() - began)
            if not ahead:
                reading = _thread(file.read, size)
    finally:
        try:
            await asyncio.wait([reading])
        finally:
            file.close()


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
