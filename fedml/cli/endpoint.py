"""A site as one program: its daemon, and beside it the endpoint that serves what was released.

Daemon and serving do not know each other; here, on the roof, they are put together.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog
from structlog.contextvars import bind_contextvars

from fedml.errors import Untrusted
from fedml.identity.certificates import Credentials
from fedml.protocol.messages import Serving
from fedml.releases.session import rehearse
from fedml.releases.shelf import Shelf
from fedml.releases.trust import Trust
from fedml.serving.engine import Engine
from fedml.serving.faces import Server
from fedml.site.daemon import Daemon
from fedml.site.departure import check_member
from fedml.site.policy import read_policy
from fedml.site.settings import read_settings
from fedml.transport.chunks import BlobStore
from fedml.transport.fetching import Fetching
from fedml.transport.link import Link
from fedml.transport.renewal import keep_certified
from fedml.transport.rpc import GrpcLink

ROOT, SHELF, IDENTITY = Path("trust/root.json"), Path("shelf"), Path("identity")
_LARGEST_FILE = 64 * 2**30  # bytes
_log = structlog.get_logger()


class ReleaseEndpoint:
    """Fetches a released bundle, makes sure of it, and lets the engine switch to it."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self._folder, self._engine = folder, engine
        self._shelf = Shelf(folder / SHELF)
        self._files = BlobStore(folder / "trust" / "files", _LARGEST_FILE)
        self._turn = asyncio.Lock()

    def serving(self) -> tuple[Serving, ...]:
        """Return what is served now."""
        return self._engine.serving()

    async def update(self, model: str, link: Link) -> Serving:
        """Bring the current release of `model` into service; raises `Untrusted` if it is not good.

        What was served before goes on being served, whatever happens here.
        """
        async with self._turn:
            calls = Fetching(link, asyncio.get_running_loop(), self._files)
            root = (self._folder / ROOT).read_bytes()
            trust = Trust(self._folder / "trust", root, calls.fetch, calls.download)
            await asyncio.to_thread(self._obtain, trust, model)
            await self._engine.refresh()
            self._files.sweep(())
        for serving in self._engine.serving():
            if serving.model == model:
                return serving
        raise Untrusted(f"{model}: was activated, and is not served; see the site's log")

    def _obtain(self, trust: Trust, model: str) -> None:
        trust.refresh()
        manifest = self._shelf.add(trust.obtain(model))
        self._shelf.activate(model, manifest.version, rehearse)


class Site:
    """A site's daemon and its endpoint in one program."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._name = folder, ""
        self._daemon: Daemon | None = None

    async def run(self) -> None:
        """Serve until cancelled.

        Raises `ConfigError` for anything wrong in the folder, a port that is taken or a site that
        has left, and `PermissionDenied` if the coordinator shuts the site out.
        """
        folder = self._folder
        check_member(folder)
        settings, policy = read_settings(folder), read_policy(folder / "policy.toml")
        self._name = settings.name
        bind_contextvars(site=self._name)
        link = GrpcLink(Credentials.load(folder / IDENTITY))
        engine = Engine(Shelf(folder / SHELF))
        daemon = Daemon(folder, settings, policy, link, ReleaseEndpoint(folder, engine))
        try:
            await engine.refresh()
            ports = (settings.rest_port, settings.grpc_port, settings.serve_host)
            async with Server(engine, *ports, unready=daemon.unready) as server:
                _log.info("serving", rest_port=server.rest_port, grpc_port=server.grpc_port)
                renewal = asyncio.create_task(keep_certified(link, folder / IDENTITY))
                self._daemon = daemon
                try:
                    await daemon.run()
                finally:
                    renewal.cancel()
        finally:
            await engine.close()

    async def drain(self) -> None:
        """End the tasks under way, or leave them on the disk; what is served goes on meanwhile."""
        if self._daemon is not None:
            bind_contextvars(site=self._name)  # whoever heard the signal knows no names
            await self._daemon.drain()
