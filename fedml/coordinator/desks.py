"""What stands behind the coordinator's doors: for sites, for newcomers, for operators.

Who calls is known and allowed when a desk is asked (`identity.access`). What changes something
goes into the audit log, refusals too.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from fedml import failpoints
from fedml.coordinator.archive import Archive
from fedml.coordinator.branches import Branches
from fedml.coordinator.desk import Desk
from fedml.coordinator.folder import Folder
from fedml.coordinator.runs import Runs
from fedml.errors import ConfigError, FedmlError, Refused
from fedml.identity.certificates import Identity
from fedml.identity.enrolment import Registrar
from fedml.protocol.messages import Blob, Hello, RunId, SiteEvent, SiteId, TaskId
from fedml.protocol.operations import Invitation, ModelVersion, Role, RunDetail, RunInfo, SiteInfo
from fedml.protocol.requests import Admission, JoinRequest
from fedml.releases.registry import Registry
from fedml.transport.chunks import BlobStore
from fedml.transport.desks import Send
from fedml.transport.pulse import Pulse


@dataclass(frozen=True)
class Federation:
    """Sites speak here. A site gets the blobs it was assigned and released ones, no others.

    So does a region, of which there are some at a coordinator that has `branches`.
    """

    release_file: Callable[[str], Path]
    desk: Desk
    blobs: BlobStore
    released: BlobStore
    branches: Branches | None = None

    async def attend(
        self, site: Identity, hello: Hello, events: AsyncIterator[SiteEvent], send: Send
    ) -> None:
        """Serve one site's stream until it ends."""
        name = SiteId(site.name)
        if site.role != "region":
            await self.desk.attend(name, hello, events, send)
        elif self.branches is not None:
            await self.branches.attend(name, hello, events, send)
        else:
            raise Refused(f"{site} calls a region, and a tree has two levels: join its parent")

    def pulse(self, site: Identity) -> Pulse:
        """Return what heeds the site's signs of life that are no events."""
        return self.desk.pulse(SiteId(site.name))

    async def outgoing(self, site: Identity, digest: str) -> BlobStore:
        """Return the store with a model the site was assigned, or with a released file."""
        if self.desk.model_of(SiteId(site.name), digest):
            return self.blobs
        if self.released.has(digest):
            return self.released
        raise Refused(f"blob {digest[:12]} is not for {site.name}")

    async def incoming(self, site: Identity, task: TaskId, blob: Blob) -> BlobStore | None:
        """Return the store for a task's update, if the site owes one and it is not too large."""
        desk, name = self.desk, self.desk.whose(SiteId(site.name), task)
        if desk.is_settled(name, task):
            return None
        if objection := desk.objection(name, task, blob):
            raise Refused(f"{site.name} offers {blob.size} bytes; {objection}")
        return self.blobs

    async def file(self, site: Identity, name: str) -> bytes:
        """Return a file of the release metadata."""
        return self.release_file(name).read_bytes()


@dataclass(frozen=True)
class Enrolment:
    """Newcomers speak here, those whose certificate grows old, and those who leave."""

    folder: Folder
    registrar: Registrar

    async def join(self, request: JoinRequest) -> Admission:
        """Admit the holder of a token; every attempt is on record."""
        now = time.time()
        try:
            admission = self.registrar.join(request.id, request.secret, request.csr, now)
        except FedmlError as error:
            self.folder.audit.note(f"token {request.id[:16]}", "join", now, str(error))
            raise
        self.folder.audit.note(f"token {request.id[:16]}", "join", now)
        return admission

    async def renew(self, who: Identity, csr: bytes) -> Admission:
        """Issue a fresh certificate for the same name and role."""
        now = time.time()
        self.folder.audit.note(str(who), "renew", now)
        return self.registrar.renew(who, csr, now)

    async def leave(self, who: Identity) -> None:
        """Refuse every certificate and token that the caller was given so far."""
        now = time.time()
        self.registrar.revoke(who.name, now)
        self.folder.audit.note(str(who), "leave", now)


@dataclass(frozen=True)
class Operations:
    """Operators and viewers speak here."""

    folder: Folder
    runs: Runs
    archive: Archive
    registrar: Registrar

    async def submit(self, by: Identity, plan: str, starts: float = 0.0) -> RunInfo:
        """Queue a run."""
        info = await self.runs.submit(by.name, plan, starts)
        self._note(by, f"submit {info.id}")
        return info

    async def list_runs(self, by: Identity) -> Sequence[RunInfo]:
        """Return all runs, oldest first."""
        return self.runs.all()

    async def show_run(self, by: Identity, run: RunId) -> RunDetail:
        """Return a run with all its receipts."""
        return self.runs.detail(run)

    async def watch_run(self, by: Identity, run: RunId) -> AsyncGenerator[RunInfo, None]:
        """Yield the run now and at each change, until it ends."""
        async with aclosing(self.runs.watch(run)) as infos:
            async for info in infos:
                yield info

    async def stop_run(self, by: Identity, run: RunId) -> RunInfo:
        """Stop a run; what was committed stays."""
        info = await self.runs.halt(run, f"stopped by {by.name}")
        self._note(by, f"stop {run}")
        return info

    async def resume_run(self, by: Identity, run: RunId) -> RunInfo:
        """Let a run that was stopped or failed go on from its last committed round."""
        info = await self.runs.go_on(run, by.name)
        self._note(by, f"resume {run}")
        return info

    async def list_models(self, by: Identity) -> Sequence[ModelVersion]:
        """Return all versions of all models."""
        return await self.archive.do(lambda registry: registry.list())

    async def show_model(self, by: Identity, model: str, version: int) -> ModelVersion:
        """Return one version with its manifest."""
        return await self.archive.do(lambda registry: registry.get(model, version))

    async def release(self, by: Identity, model: str, version: int) -> ModelVersion:
        """Sign a version and point the model's channel at it; the sites hear of it at once."""

        def publish(registry: Registry) -> ModelVersion:
            row = registry.get(model, version)
            if row.state == "withdrawn":
                raise ConfigError(f"{model}/{version} was withdrawn; release another version")
            self.folder.releases.publish(registry.bundle(model, version))
            failpoints.reach("release.published")
            return registry.promote(model, version)

        released = await self.archive.do(publish)
        failpoints.reach("release.promoted")
        self._note(by, f"release {model}/{version}")
        self.runs.desk.announce(model)
        return released

    async def rollback(self, by: Identity, model: str) -> ModelVersion:
        """Make the version live that was live before."""

        def go_back(registry: Registry) -> ModelVersion:
            channel = self.folder.releases.rollback(model)
            return registry.promote(model, channel.version)

        back = await self.archive.do(go_back)
        self._note(by, f"rollback {model} to {back.version}")
        self.runs.desk.announce(model)
        return back

    async def list_sites(self, by: Identity) -> Sequence[SiteInfo]:
        """Return all sites that were here since the coordinator started."""
        return self.runs.desk.sites()

    async def invite(self, by: Identity, name: str, role: Role, ttl: float) -> Invitation:
        """Mint a join token."""
        invitation = self.registrar.invite(name, role, ttl, time.time())
        self._note(by, f"invite {role} {name}")
        return invitation

    async def revoke(self, by: Identity, name: str) -> None:
        """Refuse every certificate and token that `name` was given so far."""
        self.registrar.revoke(name, time.time())
        self._note(by, f"revoke {name}")

    def _note(self, by: Identity, what: str) -> None:
        self.folder.audit.note(str(by), what, time.time())
