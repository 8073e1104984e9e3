"""Both faces of an engine on their ports, inside somebody's event loop.

No signal handlers, no logging set-up, no thread of its own: a site's daemon starts it beside its
other work, and `standalone` starts it alone.
"""

from __future__ import annotations

import asyncio
import hmac
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import grpc
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from fedml.errors import ConfigError
from fedml.serving.engine import Engine
from fedml.serving.rest import build_app
from fedml.serving.rpc import SERVICE, build_handler

if TYPE_CHECKING:
    _Interceptor = grpc.aio.ServerInterceptor[object, object]
else:
    _Interceptor = grpc.aio.ServerInterceptor  # generic only to its stubs

_OPEN_PATHS = frozenset(["/v2/health/live", "/v2/health/ready", "/healthz", "/readyz"])
_OPEN_METHODS = frozenset([f"/{SERVICE}/ServerLive", f"/{SERVICE}/ServerReady"])
_GRACE = 5.0  # seconds for requests in flight when stopping
_DENIED = "this endpoint wants an 'authorization: Bearer ...' header with its token"


@dataclass(frozen=True)
class Access:
    """Who may ask, and over what: a bearer token, and TLS by PEM files; "" and None are without.

    Health checks need no token.
    """

    token: str = ""
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("serving TLS: give both a certificate and a key, or neither")
        for path in (self.certificate, self.key):
            if path and not path.is_file():
                raise ConfigError(f"serving TLS: {path} does not exist")

    def allows(self, header: str) -> bool:
        """True if an Authorization header carries the token, or none is asked."""
        wanted = f"Bearer {self.token}".encode()
        return not self.token or hmac.compare_digest(header.encode(), wanted)


class Server:
    """An engine's REST and gRPC ports, open while the context is.

    Port 0 takes a free one and None leaves the face out; entering sets `rest_port` and
    `grpc_port` to what was taken, and raises `ConfigError` naming a port that is in use.
    `unready` says why the program around the engine takes no work, "" while it does.
    """

    def __init__(
        self,
        engine: Engine,
        rest_port: int | None = 0,
        grpc_port: int | None = 0,
        host: str = "127.0.0.1",
        access: Access | None = None,
        unready: Callable[[], str] = lambda: "",
    ) -> None:
        self.rest_port, self.grpc_port, self._unready = rest_port, grpc_port, unready
        self._engine, self._host, self._access = engine, host, access or Access()
        self._stops: list[Callable[[], Awaitable[None]]] = []

    async def __aenter__(self) -> Server:
        try:
            if self.grpc_port is not None:
                self.grpc_port = await self._start_grpc(self.grpc_port)
            if self.rest_port is not None:
                self.rest_port = await self._start_rest(self.rest_port)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        while self._stops:
            await self._stops.pop()()

    async def _start_grpc(self, port: int) -> int:
        server = grpc.aio.server(
            interceptors=[_Token(self._access)] if self._access.token else None,
            options=[
                ("grpc.so_reuseport", 0),  # else two servers share a port and halve each other
                ("grpc.max_receive_message_length", self._engine.limits.bytes),
                ("grpc.max_send_message_length", -1),
            ],
        )
        server.add_generic_rpc_handlers((build_handler(self._engine),))
        address = f"{self._host}:{port}"
        try:
            if self._access.certificate and self._access.key:
                pair = (self._access.key.read_bytes(), self._access.certificate.read_bytes())
                found = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
            else:
                found = server.add_insecure_port(address)
        except RuntimeError as error:
            raise _taken("gRPC", self._host, port) from error
        await server.start()

        async def stop() -> None:
            await server.stop(_GRACE)

        self._stops.append(stop)
        return found

    async def _start_rest(self, port: int) -> int:
        try:
            listener = socket.create_server((self._host, port))
        except OSError as error:
            raise _taken("REST", self._host, port) from error
        # accepted sockets inherit it; asyncio forgets to set it, and each answer waits 40 ms
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        app: ASGIApp = build_app(self._engine, self._unready)
        config = uvicorn.Config(
            _guarded(app, self._access) if self._access.token else app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(_GRACE),
            ssl_certfile=self._access.certificate,
            ssl_keyfile=self._access.key,
        )
        try:
            config.load()
        except OSError as error:
            listener.close()
            raise ConfigError(f"serving TLS: {error}; check certificate and key") from error
        server = uvicorn.Server(config)
        # its parts, not `serve`: that one takes the process's signals
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[listener])
        ticking = asyncio.create_task(server.main_loop(), name="rest clock")

        async def stop() -> None:
            server.should_exit = True
            await ticking
            await server.shutdown(sockets=[listener])

        self._stops.append(stop)
        return int(listener.getsockname()[1])


def _taken(face: str, host: str, port: int) -> ConfigError:
    return ConfigError(
        f"{face} port {port} on {host} is in use or not ours to take; choose another, or 0 for "
        "any free one"
    )


def _guarded(app: ASGIApp, access: Access) -> ASGIApp:
    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            if not access.allows(header):
                await _deny(send)
                return
        await app(scope, receive, send)

    return guarded


async def _deny(send: Send) -> None:
    body = b'{"error": "%s"}' % _DENIED.encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Token(_Interceptor):
    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[object, object]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[object, object]:
        metadata = dict(handler_call_details.invocation_metadata or ())
        header = metadata.get("authorization", "")
        text = header.decode("latin-1") if isinstance(header, bytes) else header
        if handler_call_details.method in _OPEN_METHODS or self._access.allows(text):
            return await continuation(handler_call_details)

        async def deny(_: object, context: grpc.aio.ServicerContext[object, object]) -> object:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, _DENIED)

        return grpc.unary_unary_rpc_method_handler(deny)
