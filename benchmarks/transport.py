"""Seconds to move one blob up and down over our link, beside bare gRPC.

    python -m benchmarks.transport [MEGABYTES]

"Bare" is grpc.aio, moving as many bytes in 1 MiB messages from memory to nowhere: no disk, no
digest, no messages of ours; without and with mutual TLS. Each figure is the best of three.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc

from fedml.identity.certificates import Credentials
from fedml.protocol.codec import MAX_CHUNK
from fedml.transport.rpc import GrpcLink
from fedml.transport.server import ServerTls, serve
from fedml.transport.terms import CLIENT_OPTIONS, SERVER_OPTIONS
from tests.transport.world import World

PASSES = 3
PIECE = os.urandom(MAX_CHUNK)
Context = grpc.aio.ServicerContext[bytes, bytes]


async def take(requests: AsyncIterator[bytes], context: Context) -> bytes:
    """Read all and keep nothing."""
    async for _ in requests:
        pass
    return b""


async def give(request: bytes, context: Context) -> AsyncIterator[bytes]:
    """Send as many pieces as asked."""
    for _ in range(int(request)):
        yield PIECE


async def bare(megabytes: int, tls: ServerTls | None, papers: Credentials) -> tuple[float, float]:
    """Return seconds up and down over plain gRPC."""
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handlers = {
        "Take": grpc.stream_unary_rpc_method_handler(take),
        "Give": grpc.unary_stream_rpc_method_handler(give),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", handlers),))
    channel = _connected(server, tls, papers)
    await server.start()

    async def up() -> None:
        await channel.stream_unary("/bare/Take", bytes, bytes)(PIECE for _ in range(megabytes))

    async def down() -> None:
        async for _ in channel.unary_stream("/bare/Give", bytes, bytes)(b"%d" % megabytes):
            pass

    seconds = await best(up), await best(down)
    await channel.close(None)
    await server.stop(None)
    return seconds


def _connected(
    server: grpc.aio.Server, tls: ServerTls | None, papers: Credentials
) -> grpc.aio.Channel:
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
        return grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CLIENT_OPTIONS)
    terms = grpc.ssl_server_credentials([(tls.key, tls.certificate)], tls.ca, True)
    port = server.add_secure_port("127.0.0.1:0", terms)
    mine = grpc.ssl_channel_credentials(papers.ca, papers.key, papers.certificate)
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", mine, options=CLIENT_OPTIONS)


async def ours(megabytes: int, world: World, tls: ServerTls) -> tuple[float, float]:
    """Return seconds up and down over a link: mutual TLS, disk, digest, fsync, leave."""
    desk, mine = world.desk, world.site_store()
    desk.store.limit_bytes = mine.limit_bytes = 2**40
    blob = mine.put_bytes(os.urandom(megabytes * MAX_CHUNK))
    desk.may_get.add(blob.digest)
    desk.asked_for.add(blob)
    address = "127.0.0.1:0"
    async with serve(
        world.desks, world.access, tls, address=address, enrolment_address=address
    ) as server:
        world.port = server.port
        link = GrpcLink(world.credentials())

        async def up() -> None:
            await link.upload(blob, mine)

        async def down() -> None:
            await link.download(blob, mine)

        seconds = (
            await best(up, lambda: desk.store.delete(blob.digest)),
            await best(down, lambda: mine.delete(blob.digest)),
        )
        await link.close()
    return seconds


async def best(act: Callable[[], Awaitable[None]], clear: Callable[[], object] = bool) -> float:
    """Return the seconds of the fastest pass; `clear` comes before each and does not count."""
    times = []
    for _ in range(PASSES):
        clear()
        start = time.perf_counter()
        await act()
        times.append(time.perf_counter() - start)
    return min(times)


async def main(megabytes: int) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        world = World.build(Path(folder))
        certificate, key = world.authority.issue_server(["127.0.0.1"], time.time())
        tls = ServerTls(certificate, key, world.authority.certificate)
        rows = {
            "bare gRPC": await bare(megabytes, None, world.credentials()),
            "bare gRPC, mutual TLS": await bare(megabytes, tls, world.credentials()),
            "our link": await ours(megabytes, world, tls),
        }
    for name, (up, down) in rows.items():
        print(f"{name:24} up {up:6.3f} s  down {down:6.3f} s")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
