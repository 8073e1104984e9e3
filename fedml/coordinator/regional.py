"""The regional coordinator program: a coordinator's folder that has joined a parent.

It has its own authority and its own doors, so its leaves never meet the parent. What operators may
do here is about leaves; runs, models and releases are the parent's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import structlog
import torch

from fedml import durable, health, pages
from fedml.coordinator.desk import Desk
from fedml.coordinator.desks import Enrolment, Federation
from fedml.coordinator.folder import Folder
from fedml.coordinator.mirror import Mirror
from fedml.coordinator.region import Region
from fedml.coordinator.service import HEAPS, KEPT, allow_files, registrar_of, tls_of
from fedml.coordinator.settings import PARENT, RELEASES, is_region, read_settings
from fedml.errors import ConfigError
from fedml.identity.certificates import Credentials, Identity, identity_in
from fedml.identity.enrolment import Registrar, Token
from fedml.protocol.messages import RunId
from fedml.protocol.operations import Invitation, ModelVersion, Role, RunDetail, RunInfo, SiteInfo
from fedml.releases.signing import place
from fedml.transport.chunks import BlobStore
from fedml.transport.desks import Desks
from fedml.transport.fetching import FIRST_ROOT
from fedml.transport.renewal import keep_certified
from fedml.transport.rpc import GrpcLink, join, trusted_root
from fedml.transport.server import serve

_SHARES = Path("shares")  # of rounds that are open
_log = structlog.get_logger()


async def join_parent(folder: Path, token: str) -> Identity:
    """Make the coordinator in `folder` a region of the one that minted the token.

    Raises `ConfigError` if it has runs of its own, is a region already, or the token is a site's.
    """
    read_settings(folder)
    with durable.lock(folder, "fedml coordinator join"):
        if is_region(folder):
            parent = Credentials.load(folder / PARENT).address
            raise ConfigError(
                f"{folder} is a region of {parent} already; make another with 'fedml coordinator "
                "init', or stop it and delete its 'parent' folder once no run is open"
            )
        journal = folder / "journal.jsonl"
        if journal.exists() and journal.stat().st_size:
            raise ConfigError(
                f"{folder} has runs of its own, and a region's runs are its parent's; make a "
                "coordinator for the region with 'fedml coordinator init'"
            )
        draft = folder / "parent.new"
        identity = _broken_off(draft, token) or await join(token, draft, "region")
        root = place(draft / RELEASES.relative_to(PARENT), FIRST_ROOT)
        durable.replace(root, await trusted_root(draft))
        draft.rename(folder / PARENT)
        durable.sync_folder(folder)
    return identity


def _broken_off(draft: Path, token: str) -> Identity | None:
    """Return who we are by a join that spent its token and went no further."""
    if not (draft / "identity.json").exists():
        return None
    papers = Credentials.load(draft)
    if papers.ca.strip() != Token.parse(token).ca.strip():
        return None
    return identity_in(papers.certificate)


class Regional:
    """The region in a folder, as one program."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def run(self) -> None:
        """Serve until cancelled.

        Raises `ConfigError` if the folder is none, is in use, or a port is taken, `Corrupt` if
        something in it is damaged, and `PermissionDenied` if the parent shuts the region out.
        """
        path, settings = self._path, read_settings(self._path)
        allow_files()
        pages.keep_freed(KEPT, arenas=HEAPS)
        torch.set_num_threads(1)  # as in `service`
        with durable.lock(path, "a regional coordinator"):
            folder = Folder.open(path)
            papers = Credentials.load(path / PARENT)
            link = GrpcLink(papers)
            blobs = BlobStore.in_transit(path / "blobs", settings.blob_limit_mb * 2**20)
            region = Region(
                path / _SHARES,
                link,
                blobs,
                Mirror(path / RELEASES, link, settings.blob_limit_mb * 2**20),
                heartbeat=settings.heartbeat,
                grace=settings.grace,
            )
            us = f"{identity_in(papers.certificate).name} is a region of {papers.address}"
            listening = serve(
                desks_of(folder, region, blobs, us),
                folder.access,
                tls_of(folder),
                address=f"{settings.bind}:{settings.port}",
                enrolment_address=f"{settings.bind}:{settings.enrolment_port}",
            )
            watched = health.serve(settings.health_bind, settings.health_port, region.unready)
            async with watched as health_port, listening as server:
                ports = {"port": server.port, "enrolment_port": server.enrolment_port}
                _log.info("region ready", parent=papers.address, **ports, health_port=health_port)
                renewal = asyncio.create_task(keep_certified(link, path / PARENT))
                try:
                    await region.run()
                finally:
                    renewal.cancel()

    async def drain(self) -> None:
        """Nothing to wait for: leaves keep their updates, and what is summed lies on the disk."""


def desks_of(folder: Folder, region: Region, blobs: BlobStore, us: str) -> Desks:
    """Return what stands behind a region's doors; `us` says of whom it is one."""
    registrar, mirror = registrar_of(folder), region.mirror
    return Desks(
        federation=Federation(mirror.file, region.desk, blobs, mirror.store),
        operations=LeafOperations(folder, region.desk, registrar, us),
        enrolment=Enrolment(folder, registrar),
    )


@dataclass(frozen=True)
class LeafOperations:
    """A region's operators speak here; `us` says of whom it is one."""

    folder: Folder
    desk: Desk
    registrar: Registrar
    us: str

    def _refuse(self) -> NoReturn:
        raise ConfigError(f"{self.us}: runs, models and releases are there; use a profile of its")

    async def submit(self, by: Identity, plan: str, starts: float = 0.0) -> RunInfo:
        """Refuse."""
        self._refuse()

    async def list_runs(self, by: Identity) -> Sequence[RunInfo]:
        """Refuse."""
        self._refuse()

    async def show_run(self, by: Identity, run: RunId) -> RunDetail:
        """Refuse."""
        self._refuse()

    async def watch_run(self, by: Identity, run: RunId) -> AsyncGenerator[RunInfo, None]:
        """Refuse."""
        self._refuse()
        yield  # makes it a generator

    async def stop_run(self, by: Identity, run: RunId) -> RunInfo:
        """Refuse."""
        self._refuse()

    async def resume_run(self, by: Identity, run: RunId) -> RunInfo:
        """Refuse."""
        self._refuse()

    async def list_models(self, by: Identity) -> Sequence[ModelVersion]:
        """Refuse."""
        self._refuse()

    async def show_model(self, by: Identity, model: str, version: int) -> ModelVersion:
        """Refuse."""
        self._refuse()

    async def release(self, by: Identity, model: str, version: int) -> ModelVersion:
        """Refuse."""
        self._refuse()

    async def rollback(self, by: Identity, model: str) -> ModelVersion:
        """Refuse."""
        self._refuse()

    async def list_sites(self, by: Identity) -> Sequence[SiteInfo]:
        """Return all leaves that were here since the region started."""
        return self.desk.sites()

    async def invite(self, by: Identity, name: str, role: Role, ttl: float) -> Invitation:
        """Mint a join token, but for no further region."""
        if role == "region":
            raise ConfigError("a tree has two levels: invite the region at the parent")
        invitation = self.registrar.invite(name, role, ttl, time.time())
        self.folder.audit.note(str(by), f"invite {role} {name}", time.time())
        return invitation

    async def revoke(self, by: Identity, name: str) -> None:
        """Refuse every certificate and token that `name` was given so far."""
        self.registrar.revoke(name, time.time())
        self.folder.audit.note(str(by), f"revoke {name}", time.time())
