"""Whether a program lives and is ready, and its metrics: plain HTTP for whoever watches over it.

    /healthz   200 while its event loop turns, 503 when that stands still
    /readyz    200 while it takes work, 503 with the reason while it starts or goes down
    /metrics   Prometheus

A thread of its own answers, so a loop that stands still is told and not waited for. It asks
nobody who they are: let it listen on loopback, or on a network of one's own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from fedml.errors import ConfigError

_PATIENCE = 5.0  # seconds in which a loop must turn, and a caller ask
_POLL = 0.1  # seconds
_TEXT = "text/plain; charset=utf-8"


@asynccontextmanager
async def serve(host: str, port: int, unready: Callable[[], str]) -> AsyncIterator[int]:
    """Answer until the block is left; yields the port, a free one if 0 was asked.

    `unready` says, in the event loop, why the program is not ready, "" if it is. Raises
    `ConfigError` if the port cannot be had.
    """
    try:
        server = _Server((host, port), asyncio.get_running_loop(), unready)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} for health checks ({error}): is the port taken? Set "
            "another health_port, or 0 for a free one"
        ) from error
    thread = threading.Thread(target=server.serve_forever, args=(_POLL,), daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()


class _Server(ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        loop: asyncio.AbstractEventLoop,
        unready: Callable[[], str],
    ) -> None:
        self._loop, self._unready = loop, unready
        super().__init__(address, _Face)

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Return status, kind and body."""
        match path.partition("?")[0]:
            case "/healthz":
                reason = self._ask(lambda: "")
            case "/readyz":
                reason = self._ask(self._unready)
            case "/metrics":
                return 200, CONTENT_TYPE_LATEST, generate_latest()
            case _:
                return 404, _TEXT, b"there are /healthz, /readyz and /metrics\n"
        return (503 if reason else 200), _TEXT, f"{reason or 'ok'}\n".encode()

    def _ask(self, what: Callable[[], str]) -> str:
        answer: Future[str] = Future()
        try:
            self._loop.call_soon_threadsafe(lambda: answer.set_result(what()))
            return answer.result(_PATIENCE)
        except (TimeoutError, RuntimeError):  # the latter: it is closed
            return f"the event loop stands still for {_PATIENCE:g} s"


class _Face(BaseHTTPRequestHandler):
    server: _Server
    timeout = _PATIENCE

    def do_GET(self) -> None:
        """Answer, and hang up."""
        status, kind, body = self.server.answer(self.path)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Say nothing: who watches asks every few seconds."""
