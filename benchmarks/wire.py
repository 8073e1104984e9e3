"""The limit of a round: the same bytes over bare gRPC with the same TLS, and nothing else.

One server, four clients, each a process. A round is: the model down to every client, in chunks of
1 MiB, and as much up from every client. No hash, no disk, no codec, no decisions.

    python -m benchmarks.wire serve FOLDER SIZE
    python -m benchmarks.wire call FOLDER SIZE ROUNDS
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from benchmarks.crew import Crew
from fedml.identity.certificates import Authority, Credentials, new_key_and_csr

CLIENTS = 4
_CHUNK = 2**20
_OPTIONS = [("grpc.max_receive_message_length", 2**22), ("grpc.max_send_message_length", 2**22)]
_Context = grpc.aio.ServicerContext[bytes, bytes]


@dataclass(frozen=True)
class Rounds:
    """How long each round took, and the seconds of processor that one takes, all together."""

    periods: list[float]
    cpu: float


def rounds(size: int, count: int) -> Rounds:
    """Play `count` rounds of `size` bytes, after one of warming up."""
    with tempfile.TemporaryDirectory(prefix="fedml-wire-") as place, Crew(Path(place)) as crew:
        folder = Path(place)
        authority = Authority.create(folder / "ca", time.time())
        certificate, key = authority.issue_server(["localhost"], time.time())
        Credentials("", authority.certificate, certificate, key).save(folder / "server")
        crew.start("server", "benchmarks.wire", "serve", folder / "server", size)
        address = f"localhost:{crew.await_line('server', lambda line: line.strip() or None)}"
        used = crew.cpu("server")
        names = [f"client-{number}" for number in range(CLIENTS)]
        for name in names:
            own, csr = new_key_and_csr(name)
            leaf = authority.issue(csr, name, "site", time.time())
            Credentials(address, authority.certificate, leaf, own).save(folder / name)
            crew.start(name, "benchmarks.wire", "call", folder / name, size, count + 2)
        crew.await_ends(names, 60 + count * (1 + size / 10e6))
        told = [crew.last_word(name) for name in names]
        cpu = crew.cpu("server") - used + sum(one["cpu"] for one in told)
    periods = [b - a for a, b in itertools.pairwise(told[0]["starts"][1:])]
    return Rounds(periods, cpu / (count + 2))


def _chunks(size: int) -> list[bytes]:
    data = os.urandom(size)
    return [data[start : start + _CHUNK] for start in range(0, size, _CHUNK)]


async def _serve(folder: Path, size: int) -> None:
    credentials, model = Credentials.load(folder), _chunks(size)
    here = asyncio.Barrier(CLIENTS)

    async def download(_: bytes, context: _Context) -> None:
        for chunk in model:
            await context.write(chunk)

    async def upload(chunks: AsyncIterator[bytes], context: _Context) -> bytes:
        came = 0
        async for chunk in chunks:
            came += len(chunk)
        assert came == size, f"{came} bytes of {size}"
        await here.wait()  # a round ends when all are there
        return b""

    handlers = {
        "Download": grpc.unary_stream_rpc_method_handler(download),
        "Upload": grpc.stream_unary_rpc_method_handler(upload),
    }
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("wire", handlers),))
    pair = [(credentials.key, credentials.certificate)]
    terms = grpc.ssl_server_credentials(pair, credentials.ca, True)
    print(server.add_secure_port("127.0.0.1:0", terms), flush=True)
    await server.start()
    await server.wait_for_termination()


async def _call(folder: Path, size: int, count: int) -> None:
    credentials, update = Credentials.load(folder), _chunks(size)
    keys = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate)

    async def parts() -> AsyncIterator[bytes]:
        for chunk in update:
            yield chunk

    starts, used = list[float](), time.process_time()
    async with grpc.aio.secure_channel(credentials.address, keys, options=_OPTIONS) as channel:
        download = channel.unary_stream("/wire/Download", bytes, bytes)
        upload = channel.stream_unary("/wire/Upload", bytes, bytes)
        for _ in range(count):
            starts.append(time.time())
            came = 0
            async for chunk in download(b""):
                came += len(chunk)
            assert came == size, f"{came} bytes of {size}"
            await upload(parts())
    print(json.dumps({"starts": starts, "cpu": time.process_time() - used}))


if __name__ == "__main__":
    role, place, size_text, *count_text = sys.argv[1:]
    if role == "serve":
        asyncio.run(_serve(Path(place), int(size_text)))
    else:
        asyncio.run(_call(Path(place), int(size_text), int(count_text[0])))
