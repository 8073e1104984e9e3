"""The coordinator program: opens its folder, its doors, and goes on where it left off."""

from __future__ import annotations

import asyncio
import resource
import time
from pathlib import Path

import structlog
import torch

from fedml import durable, health, pages
from fedml.coordinator.archive import Archive
from fedml.coordinator.branches import Branches
from fedml.coordinator.desks import Enrolment, Federation, Operations
from fedml.coordinator.folder import Folder
from fedml.coordinator.runs import Runs
from fedml.coordinator.settings import read_settings
from fedml.errors import FedmlError
from fedml.identity.enrolment import Registrar
from fedml.transport.chunks import BlobStore
from fedml.transport.desks import Desks
from fedml.transport.server import ServerTls, serve

_FILES = 65_536  # as many as we ask for
_FILES_A_SITE = 3  # its connection, its update as it comes, the same as it is read
_FEW_FILES = 1000 * _FILES_A_SITE + 500
KEPT, HEAPS = 2**24, 2  # freed bytes that each heap keeps for the chunks to come; heaps
_RENEWAL = 3600.0  # seconds between looks at the release metadata's expiry
_log = structlog.get_logger()


class Service:
    """The coordinator in a folder, as one program."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: Runs | None = None
        self._drain = 0.0

    async def run(self) -> None:
        """Serve until cancelled.

        Raises `ConfigError` if the folder is none, is in use, or a port is taken, and `Corrupt`
        if something in it is damaged.
        """
        path, settings = self._path, read_settings(self._path)  # before the lock: it makes folders
        allow_files()
        pages.keep_freed(KEPT, arenas=HEAPS)
        torch.set_num_threads(1)  # on a busy machine its threads wait for each other, 8 ms a time
        with durable.lock(path, "a coordinator"):
            folder = Folder.open(path)
            limit = settings.blob_limit_mb * 2**20
            blobs = BlobStore.in_transit(path / "blobs", limit)  # what was on its way comes again
            archive = Archive(folder.registry)
            runs = Runs(folder, archive, blobs)
            listening = serve(
                _desks(folder, runs, archive, blobs),
                folder.access,
                tls_of(folder),
                address=f"{settings.bind}:{settings.port}",
                enrolment_address=f"{settings.bind}:{settings.enrolment_port}",
            )
            watched = health.serve(settings.health_bind, settings.health_port, runs.unready)
            async with watched as health_port, listening as server:
                runs.resume()
                self._runs, self._drain = runs, settings.drain
                upkeep = asyncio.create_task(_keep_fresh(folder, archive))
                ports = {"port": server.port, "enrolment_port": server.enrolment_port}
                _log.info("coordinator ready", **ports, health_port=health_port)
                try:
                    await upkeep  # for ever
                finally:
                    upkeep.cancel()
                    await runs.stop()

    async def drain(self) -> None:
        """Open no further round; end those that are open, or leave them to the next start."""
        if self._runs is not None:
            _log.info("draining", seconds=self._drain)
            await self._runs.drain(self._drain)


def allow_files() -> None:
    """Raise our limit of open files as far as we may; say so if that is too little for many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most < _FEW_FILES:
        _log.warning(
            "few open files are allowed: raise the hard limit (ulimit -Hn, or LimitNOFILE= of "
            "the unit), or only so many sites can be connected",
            limit=most,
            sites=most // _FILES_A_SITE,
        )


def _desks(folder: Folder, runs: Runs, archive: Archive, blobs: BlobStore) -> Desks:
    registrar = registrar_of(folder)
    released = BlobStore(folder.releases.folder / "blobs", blobs.limit_bytes)
    return Desks(
        federation=Federation(
            folder.releases.file, runs.desk, blobs, released, Branches(runs.desk)
        ),
        operations=Operations(folder, runs, archive, registrar),
        enrolment=Enrolment(folder, registrar),
    )


def registrar_of(folder: Folder) -> Registrar:
    """Return the desk for newcomers, which tells them where to dial."""
    settings = folder.settings
    return Registrar(
        folder.authority,
        folder.invitations,
        folder.revocations,
        f"{settings.host}:{settings.enrolment_port}",
        f"{settings.host}:{settings.port}",
    )


def tls_of(folder: Folder) -> ServerTls:
    """Issue a server certificate for this start; the authority is what sites trust."""
    hosts = list(dict.fromkeys((folder.settings.host, "localhost", "127.0.0.1")))
    certificate, key = folder.authority.issue_server(hosts, time.time())
    return ServerTls(certificate, key, folder.authority.certificate)


async def _keep_fresh(folder: Folder, archive: Archive) -> None:
    """Renew the release metadata in time. At the start a failure ends us, later it is an alarm."""
    await archive.sign(folder.releases.refresh)
    if folder.settings.registry:  # not in our folder: better unreachable now than at a run's end
        await archive.do(lambda _: None)
    while True:
        await asyncio.sleep(_RENEWAL)
        try:
            await archive.sign(folder.releases.refresh)
        except FedmlError as error:
            _log.error("release metadata not renewed; sites refuse it in time", reason=str(error))
