"""A site that only moves bytes: `python -m benchmarks.puppet FOLDER NAME SIZE ROUNDS`.

It speaks the real protocol over the real `GrpcLink`, downloads each round's model, and answers at
once with an update of the same size: random values, others in each round and at each site, so
that nothing can be saved by noticing equal bytes. It ends when round ROUNDS + 1 is assigned.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

from fedml import __version__
from fedml.identity.certificates import Credentials
from fedml.learning.recipe import identify
from fedml.params import Params, encode
from fedml.protocol.messages import Accepted, Assignment, DatasetCard, Forget, Hello, Trained
from fedml.transport.chunks import BlobStore
from fedml.transport.rpc import GrpcLink

RECIPE = "breast_cancer"  # a name that both ends know; none of its code runs
DATASET = "bytes"
_STEP = 17  # floats between the updates of two rounds: no two chunks of them are equal


async def serve(folder: Path, name: str, size: int, rounds: int) -> None:
    """Answer `rounds` rounds with updates of `size` floats."""
    torch.set_num_threads(1)  # four of us, and the coordinator, share this machine
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    noise = generator.standard_normal(size + _STEP * rounds, dtype=np.float32)
    values = torch.from_numpy(noise * np.float32(0.01))
    blobs = BlobStore.in_transit(folder / "blobs", 2**40)
    link = GrpcLink(Credentials.load(folder))
    card = DatasetCard(DATASET, 1, f"{zlib.crc32(name.encode()):064x}")
    await link.connect(Hello(__version__, "cpu", (identify(RECIPE),), (card,)))
    held: dict[str, tuple[str, ...]] = {}
    while True:
        match await link.receive():
            case Assignment() as order if order.round > rounds:
                break
            case Assignment() as order:
                await link.send(Accepted(order.task))
                await link.download(order.model, blobs)
                start = _STEP * order.round
                delta = Params({"w": values[start : start + size]})
                update = await asyncio.to_thread(blobs.put_bytes, *encode({"delta": delta}))
                await link.upload(update, blobs, order.task)
                await link.send(Trained(order.task, update, 1.0))
                held[order.task] = (order.model.digest, update.digest)
            case Forget(task):
                for digest in held.pop(task, ()):
                    await asyncio.to_thread(blobs.delete, digest)
            case _:
                pass
    await link.close()


if __name__ == "__main__":
    place, own_name, floats, count = sys.argv[1:]
    asyncio.run(serve(Path(place), own_name, int(floats), int(count)))
