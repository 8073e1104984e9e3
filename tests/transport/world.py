"""A small coordinator for tests of the transport: real certificates, real ports, a plain desk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc

from fedml.errors import ConfigError, FedmlError, Refused
from fedml.identity.access import Access, Revocations
from fedml.identity.certificates import (
    Authority,
    Credentials,
    Identity,
    identity_of,
    new_key_and_csr,
)
from fedml.identity.enrolment import Invitations, Registrar
from fedml.protocol.messages import Beat, Blob, Hello, RunId, SiteEvent, SiteId, TaskId, Welcome
from fedml.protocol.operations import (
    Invitation,
    ModelVersion,
    Receipt,
    Role,
    RunDetail,
    RunInfo,
    Seal,
    SiteInfo,
)
from fedml.protocol.requests import Admission, JoinRequest
from fedml.transport.chunks import BlobStore
from fedml.transport.desks import Desks, Send
from fedml.transport.link import Link, Operations
from fedml.transport.memory import MemoryCoordinator
from fedml.transport.pulse import Pulse
from fedml.transport.rpc import GrpcLink, OperationsClient
from fedml.transport.server import ServerTls, serve

HELLO = Hello("1", "cpu")
TASK = TaskId("run-1.1.1.mercy")
MIB = 2**20


@dataclass
class Desk:
    """All three desks. Tests read what came, and set what may go."""

    store: BlobStore
    registrar: Registrar
    heard: asyncio.Queue[tuple[str, SiteEvent | str]] = field(default_factory=asyncio.Queue)
    sends: dict[str, Send] = field(default_factory=dict)
    may_get: set[str] = field(default_factory=set)
    asked_for: set[Blob] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)
    refusal: FedmlError | None = None
    calls: list[tuple[str, ...]] = field(default_factory=list)
    receipts: int = 3
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def attend(
        self, site: Identity, hello: Hello, events: AsyncIterator[SiteEvent], send: Send
    ) -> None:
        if self.refusal:
            raise self.refusal
        self.heard.put_nowait((site.name, hello))
        self.sends[site.name] = send
        send(Welcome("test", 15.0))
        try:
            async for event in events:
                self.heard.put_nowait((site.name, event))
                if isinstance(event, Beat):
                    send(Beat())
        finally:
            self.heard.put_nowait((site.name, "gone"))

    def pulse(self, site: Identity) -> Pulse:
        return Pulse()

    async def outgoing(self, site: Identity, digest: str) -> BlobStore:
        if digest not in self.may_get:
            raise Refused(f"blob {digest[:12]} is not for {site}")
        return self.store

    async def incoming(self, site: Identity, task: TaskId, blob: Blob) -> BlobStore:
        if blob not in self.asked_for:
            raise Refused(f"nobody asked {site} for blob {blob.digest[:12]}")
        return self.store

    async def file(self, site: Identity, name: str) -> bytes:
        if name not in self.files:
            raise ConfigError(f"no file {name!r}")
        return self.files[name]

    async def join(self, request: JoinRequest) -> Admission:
        return self.registrar.join(request.id, request.secret, request.csr, time.time())

    async def renew(self, who: Identity, csr: bytes) -> Admission:
        return self.registrar.renew(who, csr, time.time())

    async def leave(self, who: Identity) -> None:
        self.registrar.revoke(who.name, time.time())

    async def submit(self, by: Identity, plan: str, starts: float = 0.0) -> RunInfo:
        if not plan:
            raise ConfigError("the plan is empty")
        self.calls.append(("submit", str(by), plan, str(starts)))
        return _info("queued", 0)

    async def list_runs(self, by: Identity) -> list[RunInfo]:
        return [_info("running", number) for number in range(3)]

    async def show_run(self, by: Identity, run: RunId) -> RunDetail:
        receipts = (Receipt(run, n, 1, (SiteId("mercy"),), ()) for n in range(self.receipts))
        seals = tuple(Seal(f"{n:064x}", "") for n in range(self.receipts))
        return RunDetail(_info("done", 3), '{"plan":1}', tuple(receipts), seals, "PEM")

    async def watch_run(self, by: Identity, run: RunId) -> AsyncGenerator[RunInfo]:
        yield _info("running", 1)
        try:
            await self.changed.wait()
            yield _info("done", 3)
        finally:
            self.calls.append(("unwatched", str(by), run))

    async def stop_run(self, by: Identity, run: RunId) -> RunInfo:
        self.calls.append(("stop_run", str(by), run))
        return _info("stopped", 1)

    async def resume_run(self, by: Identity, run: RunId) -> RunInfo:
        self.calls.append(("resume_run", str(by), run))
        return _info("queued", 1)

    async def list_models(self, by: Identity) -> list[ModelVersion]:
        return [_version("m", number) for number in (1, 2)]

    async def show_model(self, by: Identity, model: str, version: int) -> ModelVersion:
        return _version(model, version)

    async def release(self, by: Identity, model: str, version: int) -> ModelVersion:
        self.calls.append(("release", str(by), model))
        return _version(model, version)

    async def rollback(self, by: Identity, model: str) -> ModelVersion:
        self.calls.append(("rollback", str(by), model))
        return _version(model, 1)

    async def list_sites(self, by: Identity) -> list[SiteInfo]:
        return [SiteInfo(SiteId("mercy"), True, 1.0)]

    async def invite(self, by: Identity, name: str, role: Role, ttl: float) -> Invitation:
        return self.registrar.invite(name, role, ttl, time.time())

    async def revoke(self, by: Identity, name: str) -> None:
        self.registrar.revoke(name, time.time())


def _info(state: str, round_: int) -> RunInfo:
    return RunInfo(RunId("r1"), "m", state, round_, 3, 1.0)  # type: ignore[arg-type]


def _version(model: str, version: int) -> ModelVersion:
    return ModelVersion(model, version, RunId("r1"), "live", "0" * 64, 1.0)


@dataclass
class World:
    """An authority, a desk, and the papers to reach it."""

    folder: Path
    authority: Authority
    revocations: Revocations
    desk: Desk
    port: int = 0
    enrolment_port: int = 0

    @classmethod
    def build(cls, folder: Path) -> World:
        authority = Authority.create(folder / "ca", time.time())
        revocations = Revocations(folder / "revocations.log")
        registrar = Registrar(authority, Invitations(folder / "inv.log"), revocations, "", "")
        return cls(
            folder, authority, revocations, Desk(BlobStore(folder / "hub", 64 * MIB), registrar)
        )

    @property
    def access(self) -> Access:
        return Access(self.revocations)

    @property
    def desks(self) -> Desks:
        return Desks(self.desk, self.desk, self.desk)

    def credentials(
        self, name: str = "mercy", role: Role = "site", *, age: float = 0.0, days: float = 30.0
    ) -> Credentials:
        key, csr = new_key_and_csr(name)
        certificate = self.authority.issue(csr, name, role, time.time() - age, days=days)
        return Credentials(f"127.0.0.1:{self.port}", self.authority.certificate, certificate, key)

    def identity(self, name: str = "mercy", role: Role = "site") -> Identity:
        return identity_of(self.credentials(name, role).certificate, time.time())

    def site_store(self, name: str = "mercy") -> BlobStore:
        return BlobStore(self.folder / name, 64 * MIB)


class Place(Protocol):
    """A running coordinator, over gRPC or in process."""

    world: World

    def link(self, name: str) -> Link: ...
    def operations(self, name: str, role: Role) -> Operations: ...
    async def stop(self) -> None: ...
    async def start(self) -> None: ...


class GrpcPlace:
    """Over mutual TLS on loopback, certified `ahead` seconds from now."""

    def __init__(self, world: World, ahead: float = 0.0) -> None:
        self.world, self._ahead = world, ahead
        self._stack = AsyncExitStack()

    def link(self, name: str = "mercy") -> Link:
        return GrpcLink(self.world.credentials(name))

    def operations(self, name: str = "eve", role: Role = "operator") -> Operations:
        return OperationsClient(self.world.credentials(name, role))

    async def start(self) -> None:
        world = self.world
        certificate, key = world.authority.issue_server(["127.0.0.1"], time.time() + self._ahead)
        server = await self._stack.enter_async_context(
            serve(
                world.desks,
                world.access,
                ServerTls(certificate, key, world.authority.certificate),
                address=f"127.0.0.1:{world.port}",
                enrolment_address=f"127.0.0.1:{world.enrolment_port}",
            )
        )
        world.port, world.enrolment_port = server.port, server.enrolment_port
        world.desk.registrar = Registrar(
            world.authority,
            world.desk.registrar.invitations,
            world.revocations,
            f"127.0.0.1:{server.enrolment_port}",
            f"127.0.0.1:{server.port}",
        )

    async def stop(self) -> None:
        await self._stack.aclose()
        self._stack = AsyncExitStack()


class MemoryPlace:
    """In process."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._coordinator = MemoryCoordinator(world.desks, world.access)

    def link(self, name: str = "mercy") -> Link:
        return self._coordinator.link(self.world.identity(name))

    def operations(self, name: str = "eve", role: Role = "operator") -> Operations:
        return self._coordinator.operations(self.world.identity(name, role))

    async def start(self) -> None:
        self._coordinator.start()

    async def stop(self) -> None:
        await self._coordinator.stop()


class Cable:
    """A TCP relay that counts bytes, and is cut after `limit` of them in one direction.

    All that passes takes `delay` seconds.
    """

    def __init__(self, port: int) -> None:
        self._port, self.up, self.down = port, 0, 0
        self.limit_up = self.limit_down = 2**60
        self.delay = 0.0
        self.dialled = 0  # connections
        self._writers: list[asyncio.StreamWriter] = []
        self._server: asyncio.Server | None = None

    async def lay(self) -> int:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.dialled += 1
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, there_writer]
        await asyncio.gather(
            self._carry(reader, there_writer, "up"), self._carry(there_reader, writer, "down")
        )

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str
    ) -> None:
        try:
            while data := await reader.read(65_536):
                room = (self.limit_up - self.up) if way == "up" else (self.limit_down - self.down)
                setattr(self, way, getattr(self, way) + len(data))
                await asyncio.sleep(self.delay)
                writer.write(data[: max(room, 0)])
                if room < len(data):
                    self.cut()
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.close()
        self._writers.clear()

    def mend(self) -> None:
        self.up = self.down = 0
        self.limit_up = self.limit_down = 2**60

    async def remove(self) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await self._server.wait_closed()


async def reach(credentials: Credentials) -> None:
    """Connect and hang up; raises whatever stands in the way."""
    link = GrpcLink(credentials)
    try:
        async with asyncio.timeout(60):
            await link.connect(HELLO)
    finally:
        await link.close()


async def raw(
    place: GrpcPlace,
    method: str,
    request: bytes,
    papers: Credentials | None,
    *,
    port: int | None = None,
    then: bytes | None = None,
) -> grpc.StatusCode:
    """Send bytes past all our own client code; return the status."""
    if papers is None or port is not None:
        terms = grpc.ssl_channel_credentials(place.world.authority.certificate)
    else:
        terms = grpc.ssl_channel_credentials(papers.ca, papers.key, papers.certificate)
    messages = iter([request] if then is None else [request, then])
    async with grpc.aio.secure_channel(f"127.0.0.1:{port or place.world.port}", terms) as channel:
        call = channel.stream_stream(f"/fedml.v1.{method}", bytes, bytes)(messages)
        async with asyncio.timeout(60):
            try:
                async for _ in call:
                    pass
            except grpc.RpcError:
                pass
            return await call.code()
