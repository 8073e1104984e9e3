"""The coordinator's side of the Federation service, whatever carries it.

It asks the desk, keeps one stream a site, and bounds what a peer can make us hold. gRPC and the
in-process link both stand in front of it, so tests without a network meet the same rules.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, closing

from fedml import __version__
from fedml.errors import (
    FedmlError,
    MalformedMessage,
    Refused,
    Unreachable,
)
from fedml.identity.access import Access
from fedml.identity.certificates import Identity
from fedml.protocol.codec import MAX_CHUNK
from fedml.protocol.messages import Command, Hello, SiteEvent
from fedml.protocol.requests import (
    Chunk,
    DownloadRequest,
    FetchRequest,
    PingRequest,
    Pong,
    Stored,
    UploadPart,
    UploadStart,
)
from fedml.transport.desks import FederationDesk
from fedml.transport.flow import Recent, catch, pour, soon
from fedml.transport.turns import Turns

BACKLOG = 1000  # commands that may wait for a site; more, and it is too slow to be there
MOVING = max(2, min(8, os.cpu_count() or 2))  # transfers each way that move at a time: `Turns`
# Not the end of the site, which has renewed it long ago; else its next handshake fails.
_EXPIRED = "this connection's certificate expired; connect again with the renewed one"
PARTING = 5.0  # seconds that a last command gets to leave
Write = Callable[[Command], Awaitable[None]]


class Reception:
    """Stands before a `FederationDesk`; each call is for a caller who was let in."""

    def __init__(self, desk: FederationDesk, access: Access) -> None:
        self._desk, self._access = desk, access
        self._streams: dict[str, _Stream] = {}
        self._downloads, self._uploads = Turns(MOVING), Turns(MOVING)
        self._recent = Recent()

    async def connect(self, who: Identity, events: AsyncIterator[SiteEvent], write: Write) -> None:
        """Serve one stream to its end; raises why it ended unless the site hung up."""
        hello = await soon(events)
        if not isinstance(hello, Hello):
            raise MalformedMessage(f"{who}: a stream starts with Hello")
        stream = _Stream(write)
        older = self._streams.get(who.name)
        self._streams[who.name] = stream
        try:
            if older is not None:
                older.end(Refused(f"another connection of {who} took over; run one daemon a site"))
                await older.over.wait()
            await stream.run(who.expires - time.time(), self._attend(who, hello, events, stream))
        finally:
            stream.over.set()
            if self._streams.get(who.name) is stream:
                del self._streams[who.name]

    async def _attend(
        self, who: Identity, hello: Hello, events: AsyncIterator[SiteEvent], stream: _Stream
    ) -> None:
        async with aclosing(self._checked(who, events)) as checked:
            await self._desk.attend(who, hello, checked, stream.send)

    async def _checked(
        self, who: Identity, events: AsyncIterator[SiteEvent]
    ) -> AsyncGenerator[SiteEvent]:
        async for event in events:  # each event: a stream may outlive its certificate's good name
            now = time.time()
            if now >= who.expires:
                raise Unreachable(_EXPIRED)
            self._access.check(who, "Federation/Connect", now)
            if isinstance(event, Hello):
                raise MalformedMessage(f"{who}: a second Hello on one stream")
            yield event

    async def download(self, who: Identity, request: DownloadRequest) -> AsyncGenerator[Chunk]:
        """Yield a blob's chunks, if it is for this site; empty ones until it is its turn."""
        store = await self._desk.outgoing(who, request.digest)
        with self._downloads.turn() as turn:
            async with aclosing(turn.waits()) as waits:
                async for _ in waits:
                    yield Chunk(b"")
            with self._recent.used() as recent:
                poured = pour(store, request.digest, request.offset, recent)
                async with aclosing(poured) as chunks:
                    async for chunk in chunks:
                        with turn.lent():
                            yield chunk
                        if not turn.mine:
                            async for _ in turn.waits():
                                yield Chunk(b"")

    async def upload(
        self, who: Identity, parts: AsyncIterator[UploadPart]
    ) -> AsyncGenerator[Stored]:
        """Take in a blob that this site was asked for.

        Says from where on to send when it is the site's turn, and in the end that all is there.
        """
        start = await soon(parts)
        if not isinstance(start, UploadStart):
            raise MalformedMessage(f"{who}: an upload starts with UploadStart")
        blob = start.blob
        store = await self._desk.incoming(who, start.task, blob)
        if store is None:
            yield Stored(blob.size, True)
            return
        with self._uploads.turn() as turn:
            async with aclosing(turn.waits()) as waits:
                async for _ in waits:
                    yield Stored(0, False)
            with closing(store.receive(blob, who.name)) as intake:
                yield Stored(intake.offset, True)
                async with (
                    aclosing(self._desk.pulse(who).of(_chunks(who, parts))) as sent,
                    aclosing(turn.over(sent)) as chunks,
                ):
                    await catch(chunks, intake)
        yield Stored(blob.size, True)

    async def fetch(self, who: Identity, request: FetchRequest) -> AsyncGenerator[Chunk]:
        """Yield the chunks of a named file."""
        data = await self._desk.file(who, request.name)
        for start in range(0, len(data), MAX_CHUNK):
            yield Chunk(data[start : start + MAX_CHUNK])

    async def ping(self, _: PingRequest) -> Pong:
        """Tell the time."""
        return Pong(time.time(), __version__)

    async def close(self) -> None:
        """End all streams; their sites find the coordinator unreachable."""
        streams = list(self._streams.values())
        for stream in streams:
            stream.end(Unreachable("the coordinator is going down"))
        for stream in streams:
            await stream.over.wait()


class _Stream:
    """One site's open stream: commands queue here, and anyone may end it with a reason."""

    def __init__(self, write: Write) -> None:
        self.over = asyncio.Event()
        self._write = write
        self._queue: asyncio.Queue[Command | None] = asyncio.Queue()
        self._reason: FedmlError | None = None
        self._bound: asyncio.Timeout | None = None
        self._writing: asyncio.Future[None] | None = None

    def send(self, command: Command) -> None:
        """Queue a command; too many of them end the stream."""
        if self._queue.qsize() >= BACKLOG:
            self.end(Unreachable(f"{BACKLOG} commands wait; the site reads too slowly"))
        elif self._reason is None and not self.over.is_set():
            self._queue.put_nowait(command)

    def end(self, reason: FedmlError) -> None:
        """Make `run` raise `reason`, now or when it starts; the first reason stands."""
        if self._reason is None:
            self._reason = reason
            if self._bound is not None and not self._bound.expired():
                self._bound.reschedule(asyncio.get_running_loop().time())

    async def run(self, seconds: float, work: Awaitable[None]) -> None:
        """Do `work`, writing what is sent meanwhile, for at most `seconds`."""
        try:
            async with asyncio.timeout(seconds) as self._bound, asyncio.TaskGroup() as group:
                if self._reason is not None:
                    self._bound.reschedule(asyncio.get_running_loop().time())
                group.create_task(self._write_all())
                await work
                self._queue.put_nowait(None)
        except TimeoutError as error:
            raise self._reason or Unreachable(_EXPIRED) from error
        except BaseExceptionGroup as group_error:
            raise _first(group_error) from group_error
        finally:
            self._bound = None
            await self._settle()

    async def _write_all(self) -> None:
        while (command := await self._queue.get()) is not None:
            self._writing = asyncio.ensure_future(self._write(command))
            await asyncio.shield(self._writing)  # gRPC cannot take a write back; see _settle

    async def _settle(self) -> None:
        """Let a write that is under way end: gRPC can say no last word before that."""
        if self._writing is not None:
            await asyncio.wait([self._writing], timeout=PARTING)
            if not self._writing.cancel() and not self._writing.cancelled():
                self._writing.exception()  # seen: the stream is over anyway


async def _chunks(who: Identity, parts: AsyncIterator[UploadPart]) -> AsyncGenerator[Chunk]:
    async for part in parts:
        if not isinstance(part, Chunk):
            raise MalformedMessage(f"{who}: a second UploadStart in one upload")
        yield part


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
