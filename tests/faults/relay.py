"""A stretch of bad network on loopback: it cuts, delays, throttles, goes silent one way, corrupts.

A `Relay` stands between the sites that dial it and the coordinator. It runs in a thread of its
own, so tests, which wait for programs, may call it at any time.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Way = Literal["up", "down"]  # to the coordinator, to the site
_READING, _LOOK = 0.5, 0.05  # seconds
_PIECE = 16_384
_IN_FLIGHT = 8  # pieces


@dataclass
class _Direction:
    """How one way of all connections is, and how many bytes went it."""

    passed: int = 0
    delay: float = 0.0  # seconds until a piece goes on
    rate: float = float("inf")  # bytes a second
    reset_at: float = float("inf")  # of `passed`, after which every connection is reset
    spoil_at: float = float("inf")  # of `passed`, where one bit is wrong
    free: asyncio.Event = field(default_factory=asyncio.Event)  # shut, it is silent


class Relay:
    """Relays TCP to `port`; in a `with` block it listens on `self.port`."""

    def __init__(self, port: int) -> None:
        self._there, self.port = port, 0
        self._loop = asyncio.new_event_loop()
        self._ways: dict[Way, _Direction] = {"up": _Direction(), "down": _Direction()}
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_cut = False
        self.connections = 0

    def __enter__(self) -> Relay:
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    # --- what tests do ------------------------------------------------------------------------

    def cut(self) -> None:
        """Reset every connection, and every new one, until `mend`."""

        def act() -> None:
            self._is_cut = True
            self._reset()

        self._do(act)

    def mend(self) -> None:
        """Let everything through again, at once and unchanged; what was held back goes on."""

        def act() -> None:
            self._is_cut = False
            for way in self._ways.values():
                way.delay, way.rate = 0.0, float("inf")
                way.reset_at = way.spoil_at = float("inf")
                way.free.set()

        self._do(act)

    def silence(self, way: Way) -> None:
        """Let nothing through one way; connections stay open and nobody is told."""
        self._do(self._ways[way].free.clear)

    def slow(self, *, delay: float = 0.0, rate: float = float("inf")) -> None:
        """Make every piece come `delay` seconds later, and `rate` bytes a second at most."""

        def act() -> None:
            for way in self._ways.values():
                way.delay, way.rate = delay, rate

        self._do(act)

    def reset_after(self, way: Way, count: int) -> None:
        """Reset all connections once `count` more bytes went one way."""
        direction = self._ways[way]
        self._do(lambda: setattr(direction, "reset_at", direction.passed + count))

    def spoil_after(self, way: Way, count: int) -> None:
        """Turn one bit over, `count` bytes on."""
        direction = self._ways[way]
        self._do(lambda: setattr(direction, "spoil_at", direction.passed + count))

    def is_due(self, way: Way) -> bool:
        """True while a reset or a spoilt bit is still to come."""
        direction = self._ways[way]
        return min(direction.reset_at, direction.spoil_at) < float("inf")

    def passed(self, way: Way) -> int:
        """Return how many bytes went one way so far."""
        return self._ways[way].passed

    def _do(self, act: Callable[[], object]) -> None:
        done = threading.Event()

        def go() -> None:
            act()
            done.set()

        self._loop.call_soon_threadsafe(go)
        assert done.wait(10)

    # --- in the thread ------------------------------------------------------------------------

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        for way in self._ways.values():
            way.free.set()
        listening = _plug()
        listening.bind(("127.0.0.1", 0))
        self.port = listening.getsockname()[1]
        server = self._loop.run_until_complete(
            asyncio.start_server(self._join, sock=listening, limit=_PIECE)
        )
        ready.set()
        self._loop.run_forever()
        server.close()
        self._reset()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        if self._is_cut:
            _abort(writer)
            return
        try:
            plug = _plug()
            await self._loop.sock_connect(plug, ("127.0.0.1", self._there))
            there = await asyncio.open_connection(sock=plug, limit=_PIECE)
        except OSError:
            plug.close()
            _abort(writer)
            return
        self.connections += 1
        self._writers.add(there[1])
        await asyncio.gather(
            self._carry(reader, there[1], self._ways["up"]),
            self._carry(there[0], writer, self._ways["down"]),
        )

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: _Direction
    ) -> None:
        on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_IN_FLIGHT)
        taking = asyncio.create_task(self._take(reader, on_its_way, way))
        try:
            while True:
                due, data = await on_its_way.get()
                await asyncio.sleep(due - self._loop.time())
                if not data:
                    break
                await asyncio.sleep(len(data) / way.rate)
                await way.free.wait()
                if way.spoil_at < way.passed + len(data):
                    spoilt = bytearray(data)
                    spoilt[int(way.spoil_at - way.passed)] ^= 1
                    data, way.spoil_at = bytes(spoilt), float("inf")
                room = way.reset_at - way.passed
                data = data[: int(min(room, len(data)))]
                writer.write(data)
                way.passed += len(data)
                if room <= len(data):
                    way.reset_at = float("inf")
                    await writer.drain()
                    await self._until_read(writer)  # a reset throws away what was not
                    self._reset()
                await writer.drain()
        except OSError:
            pass
        finally:
            taking.cancel()
            writer.close()
            self._writers.discard(writer)

    async def _until_read(self, writer: asyncio.StreamWriter) -> None:
        """Return when the peer has had nothing to read for a while, however slow it is."""
        quiet = 0.0
        for _ in range(200):
            await asyncio.sleep(_LOOK)
            quiet = 0.0 if _unread(writer) else quiet + _LOOK
            if quiet >= _READING:
                return

    async def _take(
        self,
        reader: asyncio.StreamReader,
        on_its_way: asyncio.Queue[tuple[float, bytes]],
        way: _Direction,
    ) -> None:
        """Take pieces in, each due a delay later; an empty one is the end."""
        data = b"-"
        while data:
            try:
                data = await reader.read(_PIECE)
            except OSError:
                data = b""
            await on_its_way.put((self._loop.time() + way.delay, data))

    def _reset(self) -> None:
        for writer in [*self._writers]:
            _abort(writer)
        self._writers.clear()


def _unread(writer: asyncio.StreamWriter) -> int:
    """Return how many bytes that were written lie unread at the peer, as the kernel has it."""
    ours, theirs = (writer.get_extra_info(name)[1] for name in ("sockname", "peername"))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, remote, _, queues, *_ = line.split()
            if [int(end.rpartition(":")[2], 16) for end in (local, remote)] == [theirs, ours]:
                return int(queues.partition(":")[2], 16)
    return 0


def _plug() -> socket.socket:
    """Return a socket that takes little in ahead: a slow line does not swallow a model whole.

    Its segments are an Ethernet's: with loopback's 64 KB, more than it takes in, senders wait for
    room that never comes, and only their timers move anything.
    """
    plug = socket.socket()
    plug.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
    plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2 * _PIECE)
    plug.setblocking(False)
    return plug


def _abort(writer: asyncio.StreamWriter) -> None:
    """Have the peer see a reset, not an end."""
    plug = writer.get_extra_info("socket")
    if plug is not None and plug.fileno() >= 0:
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
