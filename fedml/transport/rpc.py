"""The doors to a coordinator over gRPC: a site's link, an operator's client, and joining."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import grpc

from fedml import durable
from fedml.errors import ConfigError, Unreachable, Untrusted
from fedml.identity.certificates import (
    Credentials,
    Identity,
    csr_for,
    identity_in,
    identity_of,
    new_key_and_csr,
)
from fedml.identity.clocks import Clock, complaint
from fedml.identity.enrolment import Token
from fedml.protocol import codec
from fedml.protocol.messages import Blob, Command, Hello, RunId, SiteEvent, TaskId, Welcome
from fedml.protocol.operations import Invitation, ModelVersion, Role, RunDetail, RunInfo, SiteInfo
from fedml.protocol.requests import (
    Admission,
    Chunk,
    Done,
    DownloadRequest,
    FetchRequest,
    InviteRequest,
    JoinRequest,
    LeaveRequest,
    ListRequest,
    ModelRequest,
    PingRequest,
    Pong,
    RenewRequest,
    RevokeRequest,
    RollbackRequest,
    RunRequest,
    Stored,
    SubmitRequest,
    UploadStart,
)
from fedml.transport.chunks import BlobStore
from fedml.transport.fetching import first_root
from fedml.transport.flow import catch, patient, pour, soon
from fedml.transport.link import SILENCE, Link
from fedml.transport.pulse import Pulse, heard
from fedml.transport.terms import CLIENT_OPTIONS, error_of, shown_certificate

T = TypeVar("T")
ANSWER = 30.0  # seconds to wait for a single answer

_Stream = grpc.aio.StreamStreamCall[bytes, bytes]


class _Line:
    """A channel to one address that speaks our dataclasses and raises our errors."""

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials,
        papers: Credentials | None = None,
    ) -> None:
        self.address, self._papers = address, papers
        self._channel = grpc.aio.secure_channel(address, credentials, options=CLIENT_OPTIONS)
        self._closing = asyncio.Event()

    @classmethod
    def of(cls, credentials: Credentials) -> _Line:
        """Dial with a client certificate."""
        return cls(
            credentials.address,
            grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate),
            credentials,
        )

    def serves(self, credentials: Credentials) -> bool:
        """True if it is up, and was dialled with this very certificate."""
        ready = grpc.ChannelConnectivity.READY
        return self._papers is credentials and self._channel.get_state() is ready

    async def reach(self, patience: float) -> None:
        """Return once connected; raises `Unreachable` after `patience` seconds."""
        try:
            async with asyncio.timeout(patience):
                await self._channel.channel_ready()
        except TimeoutError as error:
            raise Unreachable(
                f"no coordinator at {self.address} within {patience:g} s; is it running?"
            ) from error

    async def ask(self, method: str, request: object, kind: type[T]) -> T:
        """Make a call with one answer."""
        call = self._channel.unary_unary(_path(method), bytes, bytes)
        with _errors_of(self.address):
            return codec.decode(kind, await call(codec.encode(request), timeout=ANSWER))

    async def stream(self, method: str, request: object, kind: type[T]) -> AsyncGenerator[T]:
        """Make a call with many answers; leaving the loop hangs up."""
        call = self._channel.unary_stream(_path(method), bytes, bytes)(codec.encode(request))
        try:
            with _errors_of(self.address):
                async for data in call:
                    yield codec.decode(kind, data)
        finally:
            call.cancel()

    async def gather(self, method: str, request: object, kind: type[T]) -> list[T]:
        """Make a call with many answers and return them all."""
        answers: list[T] = []
        async with aclosing(self.stream(method, request, kind)) as stream:
            while (answer := await soon(stream, ANSWER)) is not None:
                answers.append(answer)
        return answers

    async def hand_in(self, start: UploadStart, source: BlobStore) -> None:
        """Send a blob when it is our turn, from where on the other end says."""
        call = self.converse("Federation/Upload")
        answers = _answers(call)
        try:
            with _errors_of(self.address):
                await self.begin(call, codec.encode_part(start))
                with suppress(asyncio.InvalidStateError):  # it is over; reading says why
                    offset = await _go(answers)
                    async with aclosing(pour(source, start.blob.digest, offset)) as chunks:
                        async for chunk in chunks:
                            await call.write(codec.encode_part(chunk))
                    await call.done_writing()
                if await _go(answers) != start.blob.size:
                    raise Unreachable(f"coordinator at {self.address}: it did not take all")
        finally:
            call.cancel()

    def converse(self, method: str) -> _Stream:
        """Open a call that sends and receives; the caller maps its errors."""
        return self._channel.stream_stream(_path(method), bytes, bytes)(None)

    async def begin(self, call: _Stream, first: bytes) -> None:
        """Send the first message; gRPC never ends the wait if its channel closes before that."""
        writing = asyncio.create_task(call.write(first))
        closing = asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait([writing, closing], return_when=asyncio.FIRST_COMPLETED)
            if not writing.done():
                raise Unreachable(f"coordinator at {self.address}: the connection was closed")
            with suppress(Unreachable), _errors_of(self.address):  # it is over; reading says why
                await writing
        finally:
            for task in (writing, closing):
                task.cancel()
            await asyncio.gather(writing, closing, return_exceptions=True)

    async def close(self) -> None:
        """Hang up, with all calls."""
        self._closing.set()
        await self._channel.close(None)


@contextmanager
def _errors_of(address: str) -> Iterator[None]:
    """Turn what gRPC raises into our errors; its own cancellations too, but never a caller's."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_of(address, error) from error
    except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
        raise Unreachable(f"coordinator at {address}: the connection is closed") from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise Unreachable(f"coordinator at {address}: the connection was closed") from error


def _path(method: str) -> str:
    return f"/{codec.PROTOCOL}.{method}"


class GrpcLink:
    """A site's `Link` over one mutual-TLS connection."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._line: _Line | None = None
        self._stream: _Stream | None = None
        self._first: Command | None = None
        self._sending = asyncio.Lock()
        self._pulse, self._clock = Pulse(), Clock()

    def use(self, credentials: Credentials) -> None:
        """Dial with these from the next `connect` on, for instance after a renewal."""
        self._credentials = credentials

    def now(self) -> float:
        """Return the coordinator's time, as far as we know it."""
        return self._clock.now(time.time(), time.monotonic())

    async def connect(self, hello: Hello) -> None:
        """See `Link`."""
        if self._stream or not (self._line and self._line.serves(self._credentials)):
            await self.close()  # else a transfer has dialled already, and goes on
            self._pulse = Pulse()
        line = self._open()
        self._stream = stream = line.converse("Federation/Connect")
        try:
            async with asyncio.timeout(ANSWER):
                await line.begin(stream, codec.encode_event(hello))
                self._first = await self._read(stream)
        except TimeoutError as error:
            raise Unreachable(f"no welcome within {ANSWER:.0f} s") from error
        except (Unreachable, Untrusted) as error:
            if blame := await self._blame_the_clock(isinstance(error, Untrusted)):
                raise Untrusted(f"{blame} ({error})") from error
            raise
        if isinstance(self._first, Welcome):
            self._clock.hear(self._first.now, time.monotonic())

    async def _blame_the_clock(self, theirs: bool) -> str:
        """Say that our clock denies a certificate, ours or `theirs`; "" if it does not."""
        now, ours = time.time(), self._credentials
        ahead = self._clock.ahead(now, time.monotonic())
        who, cure = str(identity_in(ours.certificate)), "join with a new token"
        blame = complaint(who, ours.certificate, now, ahead, cure)
        if blame or not theirs:
            return blame
        shown = await asyncio.to_thread(shown_certificate, ours.address, ours.ca)
        cure = "start the coordinator anew, which certifies it"
        return complaint("the coordinator", shown, now, ahead, cure) if shown else ""

    async def receive(self, silence: float = SILENCE) -> Command:
        """See `Link`."""
        if self._first is not None:
            command, self._first = self._first, None
            return command
        return await heard(self._pulse, self._read(self._opened()), silence)

    async def send(self, event: SiteEvent) -> None:
        """See `Link`."""
        await self._write(self._opened(), event)

    async def download(self, blob: Blob, into: BlobStore) -> None:
        """See `Link`."""
        intake = into.receive(blob)
        if into.has(blob.digest):
            return
        request = DownloadRequest(blob.digest, intake.offset)
        async with aclosing(self._open().stream("Federation/Download", request, Chunk)) as chunks:
            await catch(self._pulse.of(patient(chunks)), intake)

    async def upload(self, blob: Blob, source: BlobStore, task: TaskId) -> None:
        """See `Link`."""
        source.path(blob.digest)  # says so if it is not there
        await self._open().hand_in(UploadStart(blob, task), source)

    async def fetch(self, name: str, limit: int) -> bytes:
        """See `Link`."""
        data = bytearray()
        stream = self._open().stream("Federation/Fetch", FetchRequest(name), Chunk)
        async with aclosing(stream) as chunks:
            while (chunk := await soon(chunks)) is not None:
                data += chunk.data
                if len(data) > limit:
                    raise Untrusted(f"file {name!r} is longer than {limit} bytes")
        return bytes(data)

    async def renew(self, csr: bytes) -> Admission:
        """See `Link`."""
        return await self._open().ask("Federation/Renew", RenewRequest(csr), Admission)

    async def ping(self) -> Pong:
        """See `Link`."""
        return await self._open().ask("Federation/Ping", PingRequest(), Pong)

    async def leave(self) -> None:
        """See `Link`."""
        await self._open().ask("Federation/Leave", LeaveRequest(), Done)

    async def close(self) -> None:
        """See `Link`."""
        line, self._line, self._stream, self._first = self._line, None, None, None
        if line is not None:
            await line.close()

    def _open(self) -> _Line:
        if self._line is None:
            self._line = _Line.of(self._credentials)
        return self._line

    def _opened(self) -> _Stream:
        if self._stream is None:
            raise Unreachable("the stream is not open; connect first")
        return self._stream

    async def _write(self, stream: _Stream, event: SiteEvent) -> None:
        data = codec.encode_event(event)
        with _errors_of(self._credentials.address):
            async with self._sending:  # gRPC takes one write at a time
                await stream.write(data)

    async def _read(self, stream: _Stream) -> Command:
        address, command = self._credentials.address, None
        while command is None:
            with _errors_of(address):
                data = await stream.read()
            if not isinstance(data, bytes):
                raise Unreachable(f"coordinator at {address}: the stream ended")
            command = codec.decode_command(data)
        return command


async def _answers(call: _Stream) -> AsyncGenerator[Stored]:
    while isinstance(data := await call.read(), bytes):
        yield codec.decode(Stored, data)


async def _go(answers: AsyncGenerator[Stored]) -> int:
    """Wait until we may go on; return how much the other end has."""
    while (stored := await soon(answers)) is not None:
        if stored.go:
            return stored.size
    raise Unreachable("the coordinator broke off")


class OperationsClient:
    """An operator's `Operations` over mutual TLS."""

    def __init__(self, credentials: Credentials) -> None:
        """Raises `PermissionDenied` if the certificate is out of its time."""
        identity_of(credentials.certificate, time.time())
        self._line = _Line.of(credentials)

    async def reach(self, patience: float) -> None:
        """Return once connected; raises `Unreachable` after `patience` seconds."""
        await self._line.reach(patience)

    async def submit(self, plan: str, starts: float = 0.0) -> RunInfo:
        """See `Operations`."""
        return await self._line.ask("Operations/Submit", SubmitRequest(plan, starts), RunInfo)

    async def list_runs(self) -> Sequence[RunInfo]:
        """See `Operations`."""
        return await self._line.gather("Operations/ListRuns", ListRequest(), RunInfo)

    async def show_run(self, run: RunId) -> RunDetail:
        """See `Operations`."""
        pages = await self._line.gather("Operations/ShowRun", RunRequest(run), RunDetail)
        if not pages:
            raise Untrusted(f"run {run}: the coordinator answered nothing")
        receipts = tuple(receipt for page in pages for receipt in page.receipts)
        seals = tuple(seal for page in pages for seal in page.seals)
        return replace(pages[0], receipts=receipts, seals=seals)

    def watch_run(self, run: RunId) -> AsyncGenerator[RunInfo]:
        """See `Operations`."""
        return self._line.stream("Operations/WatchRun", RunRequest(run), RunInfo)

    async def stop_run(self, run: RunId) -> RunInfo:
        """See `Operations`."""
        return await self._line.ask("Operations/StopRun", RunRequest(run), RunInfo)

    async def resume_run(self, run: RunId) -> RunInfo:
        """See `Operations`."""
        return await self._line.ask("Operations/ResumeRun", RunRequest(run), RunInfo)

    async def list_models(self) -> Sequence[ModelVersion]:
        """See `Operations`."""
        return await self._line.gather("Operations/ListModels", ListRequest(), ModelVersion)

    async def show_model(self, model: str, version: int) -> ModelVersion:
        """See `Operations`."""
        request = ModelRequest(model, version)
        return await self._line.ask("Operations/ShowModel", request, ModelVersion)

    async def release(self, model: str, version: int) -> ModelVersion:
        """See `Operations`."""
        request = ModelRequest(model, version)
        return await self._line.ask("Operations/Release", request, ModelVersion)

    async def rollback(self, model: str) -> ModelVersion:
        """See `Operations`."""
        return await self._line.ask("Operations/Rollback", RollbackRequest(model), ModelVersion)

    async def list_sites(self) -> Sequence[SiteInfo]:
        """See `Operations`."""
        return await self._line.gather("Operations/ListSites", ListRequest(), SiteInfo)

    async def invite(self, name: str, role: Role, ttl: float) -> Invitation:
        """See `Operations`."""
        return await self._line.ask("Operations/Invite", InviteRequest(name, role, ttl), Invitation)

    async def revoke(self, name: str) -> None:
        """See `Operations`."""
        await self._line.ask("Operations/Revoke", RevokeRequest(name), Done)

    async def close(self) -> None:
        """See `Operations`."""
        await self._line.close()


async def join(text: str, folder: Path, role: Role | None = None) -> Identity:
    """Spend a join token: make a key, have it certified, keep both in `folder`; return who we are.

    The first handshake already trusts only the authority in the token. The key is on the disk
    before the token is spent, so after a crash the same call goes on. Raises `ConfigError` on a
    token that does not read or is for another `role`, `Untrusted` if another coordinator answers,
    `PermissionDenied` if the token was used by another, expired or is unknown.
    """
    token = Token.parse(text)
    pending = folder / "joining.key"
    if not pending.exists():
        durable.replace(pending, new_key_and_csr("joining")[0], mode=0o600)
    key = pending.read_bytes()
    line = _Line(token.address, grpc.ssl_channel_credentials(token.ca))
    try:
        request = JoinRequest(token.id, token.secret, csr_for(key, "joining"))
        admission = await line.ask("Enrolment/Join", request, Admission)
    except Untrusted as error:
        raise Untrusted(f"the token is for another coordinator: {error}") from error
    finally:
        await line.close()
    identity = identity_of(admission.certificate, time.time())
    if role not in (None, identity.role):
        pending.unlink()
        more = "" if role == "site" else f" --role {role}"
        raise ConfigError(
            f"the token is for a {identity.role}, and is spent now; it takes one for a {role}: "
            f"'fedml coordinator invite {identity.name}{more}'"
        )
    Credentials(admission.address, token.ca, admission.certificate, key).save(folder)
    pending.unlink()
    return identity


async def trusted_root(folder: Path) -> bytes:
    """Return the release metadata that whoever has joined with the papers in `folder` trusts."""
    link = GrpcLink(Credentials.load(folder))
    try:
        return await first_root(link)
    finally:
        await link.close()


async def renew(link: Link, folder: Path) -> Identity:
    """Have a new key certified over `link`, and keep it in `folder` instead of the old one.

    Connections that are open go on; a link made from `Credentials.load(folder)` uses the new one.
    """
    old = Credentials.load(folder)
    key, csr = new_key_and_csr("renewing")
    admission = await link.renew(csr)
    identity = identity_in(admission.certificate)  # its time is not by our clock
    replace(old, certificate=admission.certificate, key=key).save(folder)
    return identity
