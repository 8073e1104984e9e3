"""A coordinator's doors in process, without a network: for tests, demos and simulations.

The same desks, the same reception and role table, the same codec as over gRPC; only certificates
and sockets are missing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from fedml.errors import FedmlError, Unreachable, Untrusted
from fedml.identity.access import Access
from fedml.identity.certificates import Identity
from fedml.protocol import codec
from fedml.protocol.messages import Blob, Command, Hello, RunId, SiteEvent, TaskId
from fedml.protocol.operations import Invitation, ModelVersion, Role, RunDetail, RunInfo, SiteInfo
from fedml.protocol.requests import (
    Admission,
    DownloadRequest,
    FetchRequest,
    InviteRequest,
    ModelRequest,
    PingRequest,
    Pong,
    RevokeRequest,
    RollbackRequest,
    UploadPart,
    UploadStart,
)
from fedml.transport.chunks import BlobStore
from fedml.transport.desks import Desks
from fedml.transport.flow import catch, pour
from fedml.transport.link import SILENCE
from fedml.transport.pulse import Pulse, heard
from fedml.transport.reception import Reception


class MemoryCoordinator:
    """What `serve` is over gRPC: desks behind doors, which `stop` closes and `start` opens."""

    def __init__(self, desks: Desks, access: Access) -> None:
        self._desks, self._access = desks, access
        self._reception = Reception(desks.federation, access)
        self._up = True

    def link(self, who: Identity) -> MemoryLink:
        """Return a site's link; `who` stands in for its certificate."""
        return MemoryLink(self, who)

    def operations(self, who: Identity) -> MemoryOperations:
        """Return an operator's client; `who` stands in for its certificate."""
        return MemoryOperations(self, who)

    async def stop(self) -> None:
        """Be unreachable, as after a crash: open streams end."""
        self._up = False
        await self._reception.close()

    def start(self) -> None:
        """Be reachable again."""
        self._up = True

    def admit(self, who: Identity, method: str) -> Desks:
        """Return the desks; raises `Unreachable` or `PermissionDenied`."""
        self.receive(who, method)
        return self._desks

    def receive(self, who: Identity, method: str) -> Reception:
        """Return the reception; raises `Unreachable` or `PermissionDenied`."""
        if not self._up:
            raise Unreachable("the coordinator is down")
        self._access.check(who, method, time.time())
        return self._reception


class MemoryLink:
    """A site's `Link` to a `MemoryCoordinator`."""

    def __init__(self, coordinator: MemoryCoordinator, who: Identity) -> None:
        self._coordinator, self._who = coordinator, who
        self._stream: _Stream | None = None
        self._pulse = Pulse()

    async def connect(self, hello: Hello) -> None:
        """See `Link`."""
        await self.close()
        reception = self._coordinator.receive(self._who, "Federation/Connect")
        stream = _Stream(reception, self._who)
        self._pulse = Pulse()
        stream.send(hello)
        self._stream = stream
        await stream.welcomed()

    async def receive(self, silence: float = SILENCE) -> Command:
        """See `Link`."""
        return await heard(self._pulse, self._opened().receive(), silence)

    async def send(self, event: SiteEvent) -> None:
        """See `Link`."""
        self._opened().send(event)

    async def download(self, blob: Blob, into: BlobStore) -> None:
        """See `Link`."""
        reception = self._coordinator.receive(self._who, "Federation/Download")
        intake = into.receive(blob)
        if into.has(blob.digest):
            return
        request = DownloadRequest(blob.digest, intake.offset)
        async with aclosing(reception.download(self._who, request)) as chunks:
            await catch(self._pulse.of(chunks), intake)

    async def upload(self, blob: Blob, source: BlobStore, task: TaskId) -> None:
        """See `Link`."""
        reception = self._coordinator.receive(self._who, "Federation/Upload")
        await asyncio.to_thread(source.path, blob.digest)  # says so if it is not there
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        parts = _parts(UploadStart(blob, task), source, turn)
        async with aclosing(parts), aclosing(reception.upload(self._who, parts)) as answers:
            async for stored in answers:
                if stored.go and not turn.done():
                    turn.set_result(stored.size)

    async def fetch(self, name: str, limit: int) -> bytes:
        """See `Link`."""
        reception = self._coordinator.receive(self._who, "Federation/Fetch")
        async with aclosing(reception.fetch(self._who, FetchRequest(name))) as chunks:
            data = b"".join([chunk.data async for chunk in chunks])
        if len(data) > limit:
            raise Untrusted(f"file {name!r} is longer than {limit} bytes")
        return data

    async def renew(self, csr: bytes) -> Admission:
        """See `Link`."""
        desks = self._coordinator.admit(self._who, "Federation/Renew")
        return await desks.enrolment.renew(self._who, csr)

    async def ping(self) -> Pong:
        """See `Link`."""
        return await self._coordinator.receive(self._who, "Federation/Ping").ping(PingRequest())

    async def leave(self) -> None:
        """See `Link`."""
        await self._coordinator.admit(self._who, "Federation/Leave").enrolment.leave(self._who)

    async def close(self) -> None:
        """See `Link`."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.close()

    def _opened(self) -> _Stream:
        if self._stream is None:
            raise Unreachable("the stream is not open; connect first")
        return self._stream


class _Stream:
    """Two queues and the task that serves them; what ended it comes last out of `receive`."""

    def __init__(self, reception: Reception, who: Identity) -> None:
        self._events: asyncio.Queue[bytes] = asyncio.Queue()
        self._commands: asyncio.Queue[bytes] = asyncio.Queue()
        self._ready = asyncio.Event()  # something to receive: a command, or the end
        self._reason: FedmlError | None = None
        self._task = asyncio.create_task(self._serve(reception, who))

    async def _serve(self, reception: Reception, who: Identity) -> None:
        try:
            await reception.connect(who, self._arriving(), self._write)
            self._reason = Unreachable("the stream ended")
        except FedmlError as error:
            self._reason = error
        finally:
            self._end()

    def _end(self) -> None:
        self._reason = self._reason or Unreachable("the link was closed")
        self._ready.set()

    async def _arriving(self) -> AsyncIterator[SiteEvent]:
        while True:
            if event := codec.decode_event(await self._events.get()):
                yield event

    async def _write(self, command: Command) -> None:
        self._commands.put_nowait(codec.encode_command(command))
        self._ready.set()

    async def welcomed(self) -> None:
        """Wait for the first command; raises what ended the stream if none came."""
        await self._ready.wait()
        if self._reason is not None and self._commands.empty():
            raise self._reason

    async def receive(self) -> Command:
        """Wait for the next command; raises what ended the stream."""
        command = None
        while command is None:
            await self.welcomed()
            command = codec.decode_command(self._commands.get_nowait())
            if self._commands.empty() and self._reason is None:
                self._ready.clear()
        return command

    def send(self, event: SiteEvent) -> None:
        """Queue an event; raises what ended the stream."""
        if self._reason is not None:
            raise self._reason
        self._events.put_nowait(codec.encode_event(event))

    async def close(self) -> None:
        """Hang up."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._end()  # a task that never began told nobody


async def _parts(
    start: UploadStart, source: BlobStore, turn: asyncio.Future[int]
) -> AsyncGenerator[UploadPart]:
    yield start
    async with aclosing(pour(source, start.blob.digest, await turn)) as chunks:
        async for chunk in chunks:
            yield chunk


class MemoryOperations:
    """An operator's `Operations` at a `MemoryCoordinator`."""

    def __init__(self, coordinator: MemoryCoordinator, who: Identity) -> None:
        self._coordinator, self._who = coordinator, who

    async def submit(self, plan: str, starts: float = 0.0) -> RunInfo:
        """See `Operations`."""
        return await self._desks("Submit").operations.submit(self._who, plan, starts)

    async def list_runs(self) -> Sequence[RunInfo]:
        """See `Operations`."""
        return await self._desks("ListRuns").operations.list_runs(self._who)

    async def show_run(self, run: RunId) -> RunDetail:
        """See `Operations`."""
        return await self._desks("ShowRun").operations.show_run(self._who, run)

    async def watch_run(self, run: RunId) -> AsyncGenerator[RunInfo]:
        """See `Operations`."""
        async with aclosing(self._desks("WatchRun").operations.watch_run(self._who, run)) as infos:
            async for info in infos:
                yield info

    async def stop_run(self, run: RunId) -> RunInfo:
        """See `Operations`."""
        return await self._desks("StopRun").operations.stop_run(self._who, run)

    async def resume_run(self, run: RunId) -> RunInfo:
        """See `Operations`."""
        return await self._desks("ResumeRun").operations.resume_run(self._who, run)

    async def list_models(self) -> Sequence[ModelVersion]:
        """See `Operations`."""
        return await self._desks("ListModels").operations.list_models(self._who)

    async def show_model(self, model: str, version: int) -> ModelVersion:
        """See `Operations`."""
        ask = ModelRequest(model, version)
        desk = self._desks("ShowModel").operations
        return await desk.show_model(self._who, ask.model, ask.version)

    async def release(self, model: str, version: int) -> ModelVersion:
        """See `Operations`."""
        ask = ModelRequest(model, version)
        desk = self._desks("Release").operations
        return await desk.release(self._who, ask.model, ask.version)

    async def rollback(self, model: str) -> ModelVersion:
        """See `Operations`."""
        ask = RollbackRequest(model)
        return await self._desks("Rollback").operations.rollback(self._who, ask.model)

    async def list_sites(self) -> Sequence[SiteInfo]:
        """See `Operations`."""
        return await self._desks("ListSites").operations.list_sites(self._who)

    async def invite(self, name: str, role: Role, ttl: float) -> Invitation:
        """See `Operations`."""
        ask = InviteRequest(name, role, ttl)
        desk = self._desks("Invite").operations
        return await desk.invite(self._who, ask.name, ask.role, ask.ttl)

    async def revoke(self, name: str) -> None:
        """See `Operations`."""
        ask = RevokeRequest(name)
        await self._desks("Revoke").operations.revoke(self._who, ask.name)

    async def close(self) -> None:
        """See `Operations`."""

    def _desks(self, method: str) -> Desks:
        return self._coordinator.admit(self._who, f"Operations/{method}")
