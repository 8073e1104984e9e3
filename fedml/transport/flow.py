"""Blobs in motion: from a store into chunks and back, disk and hash off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeVar

from fedml import failpoints
from fedml.errors import Unreachable
from fedml.protocol.codec import MAX_CHUNK
from fedml.protocol.requests import Chunk
from fedml.telemetry import BYTES
from fedml.transport.chunks import BlobStore, Intake

A = TypeVar("A")
T = TypeVar("T")

PATIENCE = 60.0  # seconds of silence within a transfer before it is given up


async def pour(store: BlobStore, digest: str, offset: int) -> AsyncGenerator[Chunk]:
    """Yield a blob's bytes from `offset` on, reading ahead by one chunk.

    Raises `Refused` if the blob is not there.
    """
    file = store.open(digest)
    file.seek(offset)
    reading = _thread(file.read, MAX_CHUNK)
    try:
        while data := await reading:
            reading = _thread(file.read, MAX_CHUNK)
            BYTES.labels("out").inc(len(data))
            failpoints.reach("chunk.poured")
            yield Chunk(data)
    finally:
        try:
            await asyncio.wait([reading])
        finally:
            file.close()


async def catch(chunks: AsyncIterator[Chunk], intake: Intake) -> None:
    """Take all chunks in and verify the blob; what has come is kept whatever happens.

    While one chunk is hashed and written, the next is on its way. Raises `Unreachable` after
    `PATIENCE` seconds of silence, and as `Intake` does.
    """
    writing: asyncio.Future[None] | None = None
    try:
        while (chunk := await soon(chunks, PATIENCE)) is not None:
            if writing is not None:
                await writing
            writing = _thread(intake.write, chunk.data)
            BYTES.labels("in").inc(len(chunk.data))
        if writing is not None:
            await writing
        await asyncio.to_thread(intake.finish)
    finally:
        try:
            if writing is not None:
                await asyncio.wait([writing])
        finally:
            intake.close()


def _thread(act: Callable[[A], T], argument: A) -> asyncio.Future[T]:
    return asyncio.get_running_loop().run_in_executor(None, act, argument)


async def soon(items: AsyncIterator[T], patience: float) -> T | None:
    """Return the next item, None at the end; raises `Unreachable` after `patience` seconds."""
    try:
        async with asyncio.timeout(patience):
            return await anext(items, None)
    except TimeoutError as error:
        raise Unreachable(f"nothing came for {patience:.0f} s") from error
