"""Blobs in motion: from a store into chunks and back, disk and hash off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from fedml.errors import Unreachable
from fedml.protocol.codec import MAX_CHUNK
from fedml.protocol.requests import Chunk
from fedml.telemetry import BYTES
from fedml.transport.chunks import BlobStore, Intake

T = TypeVar("T")

PATIENCE = 60.0  # seconds of silence within a transfer before it is given up


async def pour(store: BlobStore, digest: str, offset: int) -> AsyncGenerator[Chunk]:
    """Yield a blob's bytes from `offset` on; raises `Refused` if it is not there."""
    file = await asyncio.to_thread(store.open, digest)
    try:
        file.seek(offset)
        while data := await asyncio.to_thread(file.read, MAX_CHUNK):
            BYTES.labels("out").inc(len(data))
            yield Chunk(data)
    finally:
        file.close()


async def catch(chunks: AsyncIterator[Chunk], intake: Intake) -> None:
    """Take all chunks in and verify the blob; what has come is kept whatever happens.

    Raises `Unreachable` after `PATIENCE` seconds of silence, and as `Intake` does.
    """
    try:
        while (chunk := await soon(chunks, PATIENCE)) is not None:
            await asyncio.to_thread(intake.write, chunk.data)
            BYTES.labels("in").inc(len(chunk.data))
        await asyncio.to_thread(intake.finish)
    finally:
        intake.close()


async def soon(items: AsyncIterator[T], patience: float) -> T | None:
    """Return the next item, None at the end; raises `Unreachable` after `patience` seconds."""
    try:
        async with asyncio.timeout(patience):
            return await anext(items, None)
    except TimeoutError as error:
        raise Unreachable(f"nothing came for {patience:.0f} s") from error
