"""Sites that only move bytes: `python -m benchmarks.puppet FOLDER SIZE ROUNDS NAME...`.

Each has its own certificate, in FOLDER/NAME, and its own connection, beats as a daemon does and
speaks the real protocol over the real `GrpcLink`. It downloads each round's model, and answers at
once with an update of the same size: random values, others in each round and at each site, so
that nothing can be saved by noticing equal bytes. All end when round ROUNDS + 1 is assigned.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from fedml import __version__, pages
from fedml.coordinator.service import allow_files
from fedml.errors import FedmlError, Unreachable
from fedml.identity.certificates import Credentials
from fedml.learning.recipe import identify
from fedml.params import Layout, Params, encode
from fedml.protocol.messages import (
    Accepted,
    Assignment,
    Beat,
    DatasetCard,
    Forget,
    Hello,
    Trained,
    Welcome,
)
from fedml.transport.backoff import Backoff
from fedml.transport.chunks import BlobStore
from fedml.transport.rpc import GrpcLink

RECIPE = "breast_cancer"  # a name that both ends know; none of its code runs
DATASET = "bytes"
_STEP = 17  # floats between the updates of two rounds: no two chunks of them are equal


class Puppet:
    """One light site, whose updates are windows of `noise` from `start` on."""

    def __init__(self, folder: Path, noise: torch.Tensor, start: int, size: int) -> None:
        self._name = folder.name
        self._noise, self._start, self._size = noise, start, size
        self._blobs = BlobStore.in_transit(folder / "blobs", 2**40)
        self._link = GrpcLink(Credentials.load(folder))
        self._updates: dict[str, str] = {}
        self.began = 0.0  # what this process had used of a processor at the first order

    async def serve(self, rounds: int) -> None:
        """Answer `rounds` rounds, then hang up."""
        card = DatasetCard(DATASET, 1, f"{zlib.crc32(self._name.encode()):064x}")
        hello = Hello(__version__, "cpu", (identify(RECIPE),), (card,))
        for wait in Backoff():  # as a daemon: hundreds that dial at once may have to
            try:
                await self._link.connect(hello)
                break
            except Unreachable:
                await asyncio.sleep(wait)
        beats: asyncio.Task[None] | None = None
        try:
            while True:
                match await self._link.receive():
                    case Welcome(heartbeat=heartbeat):
                        beats = asyncio.create_task(self._beat(heartbeat))
                    case Assignment() as order if order.round > rounds:
                        break
                    case Assignment() as order:
                        self.began = self.began or time.process_time()
                        await self._answer(order)
                    case Forget(task):
                        self._delete(self._updates.pop(task))
                    case _:
                        pass
        finally:
            if beats is not None:
                beats.cancel()
            await self._link.close()

    def _delete(self, digest: str) -> None:
        """Let a thread do it, and wait for nothing."""
        asyncio.get_running_loop().run_in_executor(None, self._blobs.delete, digest)

    async def _beat(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            await self._link.send(Beat())

    async def _answer(self, order: Assignment) -> None:
        await self._link.send(Accepted(order.task))
        await self._link.download(order.model, self._blobs)
        self._delete(order.model.digest)  # a real site would train
        start = self._start + _STEP * order.round
        noise = self._noise[start : start + self._size]
        delta = Params.over(Layout.of({"w": noise}), {noise.dtype: noise})  # and no copy of it
        update = await asyncio.to_thread(self._blobs.put_bytes, *encode({"delta": delta}))
        await self._link.upload(update, self._blobs, order.task)
        await self._link.send(Trained(order.task, update, 1.0))
        self._updates[order.task] = update.digest


async def serve(folder: Path, size: int, rounds: int, names: Sequence[str]) -> None:
    """Let all of `names` answer `rounds` rounds with updates of `size` floats."""
    allow_files()
    pages.keep_freed(2**24, arenas=2)  # as a daemon
    torch.set_num_threads(1)  # all of us, and the coordinator, share this machine
    stride = _STEP * (rounds + 1)
    generator = np.random.default_rng(zlib.crc32(names[0].encode()))
    noise = generator.standard_normal(size + stride * len(names), dtype=np.float32)
    values = torch.from_numpy(noise * np.float32(0.01))
    puppets = [
        Puppet(folder / name, values, place * stride, size) for place, name in enumerate(names)
    ]
    try:
        async with asyncio.TaskGroup() as group:
            for puppet in puppets:
                group.create_task(puppet.serve(rounds))
    except* FedmlError as errors:
        sys.exit(f"{len(errors.exceptions)} of {len(names)}: {errors.exceptions[0]}")
    print(json.dumps({"cpu": time.process_time() - min(one.began for one in puppets)}))


if __name__ == "__main__":
    place, floats, count, *own_names = sys.argv[1:]
    asyncio.run(serve(Path(place), int(floats), int(count), own_names))
