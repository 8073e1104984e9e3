"""The coordinator's gRPC ports: mutual TLS for those it knows, plain TLS for newcomers.

Requests are decoded here and not by gRPC, so that garbage on any call is a `MalformedMessage`
like any other. Every call is checked against the role table before a desk hears of it.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import grpc
import structlog

from fedml import __version__
from fedml.errors import ConfigError, FedmlError, PermissionDenied, Untrusted
from fedml.identity.access import Access
from fedml.identity.certificates import Identity, identity_of
from fedml.protocol import codec
from fedml.protocol.messages import Command
from fedml.protocol.operations import Receipt, RunDetail
from fedml.protocol.requests import (
    Done,
    DownloadRequest,
    FetchRequest,
    InviteRequest,
    JoinRequest,
    LeaveRequest,
    ListRequest,
    ModelRequest,
    PingRequest,
    RenewRequest,
    RevokeRequest,
    RollbackRequest,
    RunRequest,
    SubmitRequest,
    UploadPart,
)
from fedml.transport.desks import Desks, EnrolmentDesk, OperationsDesk
from fedml.transport.reception import Reception
from fedml.transport.terms import SERVER_OPTIONS, status_of

T = TypeVar("T")
PAGE = 200  # receipts in one piece of a run's details, and fewer if they tell of many sites
SITES = 5000  # that the receipts of one piece tell of, some 150 bytes each
GRACE = 0.2  # seconds that calls in flight get when the server stops; all of them may be repeated

_VERSION = re.compile(r"/(fedml\.v[0-9]{1,4})\.")  # how every call begins
_log = structlog.get_logger()

Context = grpc.aio.ServicerContext[bytes, bytes]
Handlers = dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]


@dataclass(frozen=True)
class ServerTls:
    """The coordinator's certificate and key, and the authority that clients must come from."""

    certificate: bytes
    key: bytes = field(repr=False)
    ca: bytes


@dataclass(frozen=True)
class Server:
    """Ports that are open: for those with a certificate, and for newcomers."""

    port: int
    enrolment_port: int


@asynccontextmanager
async def serve(
    desks: Desks, access: Access, tls: ServerTls, *, address: str, enrolment_address: str
) -> AsyncIterator[Server]:
    """Serve on both addresses (`host:port`, port 0 for any) until the block is left.

    Raises `ConfigError` if a port cannot be had.
    """
    guard, reception = _Guard(access), Reception(desks.federation, access)
    known, newcomers = (grpc.aio.server(options=SERVER_OPTIONS) for _ in range(2))
    _add(known, "Federation", _federation(guard, reception, desks.enrolment))
    _add(known, "Operations", _operations(guard, desks.operations))
    _add(newcomers, "Enrolment", _enrolment(desks.enrolment))
    for server in (known, newcomers):
        server.add_generic_rpc_handlers((_Foreign(guard),))
    pair = [(tls.key, tls.certificate + tls.ca)]
    async with AsyncExitStack() as stack:
        for server in (known, newcomers):
            stack.push_async_callback(server.stop, GRACE)
        stack.push_async_callback(reception.close)  # first, so that sites hear why
        port = _bind(known, address, grpc.ssl_server_credentials(pair, tls.ca, True))
        enrolment_port = _bind(newcomers, enrolment_address, grpc.ssl_server_credentials(pair))
        await known.start()
        await newcomers.start()
        yield Server(port, enrolment_port)


def _bind(server: grpc.aio.Server, address: str, terms: grpc.ServerCredentials) -> int:
    try:
        return server.add_secure_port(address, terms)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {address}: is the port taken? Stop what has it, or set another"
        ) from error


def _add(server: grpc.aio.Server, service: str, handlers: Handlers) -> None:
    name = f"{codec.PROTOCOL}.{service}"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


class _Guard:
    """Finds out who calls, and whether they may."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._known: dict[bytes, Identity] = {}  # by certificate: parsing takes longer than a call

    def admit(self, method: str, context: Context) -> Identity:
        """Return the caller; raises `PermissionDenied`."""
        who = self.caller(context)
        self._access.check(who, method, time.time())
        return who

    def caller(self, context: Context) -> Identity:
        """Return who calls, whatever it may do; raises `PermissionDenied` if that is nobody."""
        certificates = list(context.auth_context().get("x509_pem_cert", ()))
        if not certificates:
            raise PermissionDenied("no client certificate; join with a token first")
        pem, now = certificates[0], time.time()
        if pem not in self._known:
            if len(self._known) >= 4096:
                self._known.clear()
            self._known[pem] = identity_of(pem, now)
        return self._known[pem]


@asynccontextmanager
async def _answering(context: Context) -> AsyncIterator[None]:
    """Turn an error of ours into a status; others are bugs, and gRPC logs them."""
    try:
        yield
    except FedmlError as error:
        await context.abort(*status_of(error))


class _Calls:
    """Makes handlers of one service: decode, admit, act, encode."""

    def __init__(self, service: str, guard: _Guard) -> None:
        self._service, self._guard = service, guard
        self.handlers: Handlers = {}

    def unary(
        self, name: str, kind: type[T], act: Callable[[Identity, T], Awaitable[object]]
    ) -> None:
        """Add a call with one answer."""

        async def handle(request: bytes, context: Context) -> bytes:
            async with _answering(context):
                who = self._guard.admit(f"{self._service}/{name}", context)
                return codec.encode(await act(who, codec.decode(kind, request)))
            raise AssertionError("abort has raised")

        self.handlers[name] = grpc.unary_unary_rpc_method_handler(handle)

    def stream(
        self, name: str, kind: type[T], act: Callable[[Identity, T], AsyncGenerator[object]]
    ) -> None:
        """Add a call with many answers."""

        async def handle(request: bytes, context: Context) -> None:
            async with _answering(context):
                who = self._guard.admit(f"{self._service}/{name}", context)
                async with aclosing(act(who, codec.decode(kind, request))) as answers:
                    async for answer in answers:
                        await context.write(codec.encode(answer))

        self.handlers[name] = grpc.unary_stream_rpc_method_handler(handle)


def _federation(guard: _Guard, reception: Reception, enrolment: EnrolmentDesk) -> Handlers:
    calls = _Calls("Federation", guard)
    calls.stream("Download", DownloadRequest, reception.download)
    calls.stream("Fetch", FetchRequest, reception.fetch)
    calls.unary("Renew", RenewRequest, lambda who, r: enrolment.renew(who, r.csr))
    calls.unary("Ping", PingRequest, lambda _, r: reception.ping(r))

    async def leave(who: Identity, _: LeaveRequest) -> Done:
        await enrolment.leave(who)
        return Done()

    calls.unary("Leave", LeaveRequest, leave)

    async def connect(requests: AsyncIterator[bytes], context: Context) -> None:
        async def write(command: Command) -> None:
            await context.write(codec.encode_command(command))

        async with _answering(context):
            who = guard.admit("Federation/Connect", context)
            await reception.connect(who, _decoded(requests, codec.decode_event), write)

    async def upload(requests: AsyncIterator[bytes], context: Context) -> None:
        async with _answering(context):
            who = guard.admit("Federation/Upload", context)
            parts: AsyncIterator[UploadPart] = _decoded(requests, codec.decode_part)
            async with aclosing(reception.upload(who, parts)) as answers:
                async for stored in answers:
                    await context.write(codec.encode(stored))

    calls.handlers["Connect"] = grpc.stream_stream_rpc_method_handler(connect)
    calls.handlers["Upload"] = grpc.stream_stream_rpc_method_handler(upload)
    return calls.handlers


def _operations(guard: _Guard, desk: OperationsDesk) -> Handlers:
    calls = _Calls("Operations", guard)
    calls.unary("Submit", SubmitRequest, lambda by, r: desk.submit(by, r.plan, r.starts))
    calls.stream("ListRuns", ListRequest, lambda by, _: _each(desk.list_runs(by)))
    calls.stream("ShowRun", RunRequest, lambda by, r: _pages(desk.show_run(by, r.run)))
    calls.stream("WatchRun", RunRequest, lambda by, r: desk.watch_run(by, r.run))
    calls.unary("StopRun", RunRequest, lambda by, r: desk.stop_run(by, r.run))
    calls.unary("ResumeRun", RunRequest, lambda by, r: desk.resume_run(by, r.run))
    calls.stream("ListModels", ListRequest, lambda by, _: _each(desk.list_models(by)))
    calls.unary("ShowModel", ModelRequest, lambda by, r: desk.show_model(by, r.model, r.version))
    calls.unary("Release", ModelRequest, lambda by, r: desk.release(by, r.model, r.version))
    calls.unary("Rollback", RollbackRequest, lambda by, r: desk.rollback(by, r.model))
    calls.stream("ListSites", ListRequest, lambda by, _: _each(desk.list_sites(by)))
    calls.unary("Invite", InviteRequest, lambda by, r: desk.invite(by, r.name, r.role, r.ttl))

    async def revoke(by: Identity, request: RevokeRequest) -> Done:
        await desk.revoke(by, request.name)
        return Done()

    calls.unary("Revoke", RevokeRequest, revoke)
    return calls.handlers


def _enrolment(desk: EnrolmentDesk) -> Handlers:
    async def join(request: bytes, context: Context) -> bytes:
        async with _answering(context):
            return codec.encode(await desk.join(codec.decode(JoinRequest, request)))
        raise AssertionError("abort has raised")

    return {"Join": grpc.unary_unary_rpc_method_handler(join)}


async def _decoded(
    data: AsyncIterator[bytes], decode: Callable[[bytes], T | None]
) -> AsyncIterator[T]:
    """Yield what the messages hold, passing over kinds that only newer versions know."""
    async for message in data:
        if (decoded := decode(message)) is not None:
            yield decoded


class _Foreign(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in its stubs only
    """Refuses calls of another major version; both ends have a line that says what to do."""

    def __init__(self, guard: _Guard) -> None:
        self._guard = guard
        self._known: set[tuple[str, str]] = set()  # who was told of already, with what

    def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Return a handler that says no; None for a call of our own version."""
        match = _VERSION.match(call.method)
        if match is None or (theirs := match[1]) == codec.PROTOCOL:
            return None

        async def refuse(requests: AsyncIterator[bytes], context: Context) -> None:
            async with _answering(context):
                who = self._name(context)
                if (who, theirs) not in self._known and len(self._known) < 1000:
                    self._known.add((who, theirs))
                    _log.warning(
                        f"{who} speaks {theirs}, this coordinator {codec.PROTOCOL}: install one "
                        "major version on both"
                    )
                raise Untrusted(
                    f"you speak {theirs}, this coordinator {codec.PROTOCOL} (it is fedml "
                    f"{__version__}): install one major version on both"
                )

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _name(self, context: Context) -> str:
        try:
            return str(self._guard.caller(context))
        except FedmlError:
            return "a newcomer"


async def _each(items: Awaitable[Sequence[object]]) -> AsyncGenerator[object]:
    for item in await items:
        yield item


async def _pages(detail: Awaitable[RunDetail]) -> AsyncGenerator[RunDetail]:
    whole = await detail
    first, start = replace(whole, receipts=(), seals=()), 0
    while True:
        end = _page_end(whole.receipts, start)
        page = replace(first, receipts=whole.receipts[start:end], seals=whole.seals[start:end])
        yield page
        if end >= len(whole.receipts):
            return
        first, start = RunDetail(whole.info, ""), end


def _page_end(receipts: Sequence[Receipt], start: int) -> int:
    """Return where the page that begins with a receipt ends; it has one at least."""
    told = 0
    for place, receipt in enumerate(receipts[start : start + PAGE], start):
        told += len(receipt.asked) + len(receipt.left_out)
        if told > SITES and place > start:
            return place
    return min(start + PAGE, len(receipts))
