"""What a coordinator puts behind its doors. Desks speak our dataclasses and raise our errors.

Who calls was authenticated and allowed before a desk is asked.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedml.identity.certificates import Identity
from fedml.protocol.messages import Blob, Command, Hello, RunId, SiteEvent, TaskId
from fedml.protocol.operations import Invitation, ModelVersion, Role, RunDetail, RunInfo, SiteInfo
from fedml.protocol.requests import Admission, JoinRequest
from fedml.transport.chunks import BlobStore
from fedml.transport.pulse import Pulse

Send = Callable[[Command], None]


class FederationDesk(Protocol):
    """Sites speak here."""

    async def attend(
        self, site: Identity, hello: Hello, events: AsyncIterator[SiteEvent], send: Send
    ) -> None:
        """Serve one stream from its `hello` until `events` end; the first send is `Welcome`.

        `send` queues a command and never waits; on a stream that is down it does nothing. To
        refuse, raise. A newer stream of the same site cancels this call, and starts when it is
        over; so do a revoked or expired certificate and a site too slow to read.
        """

    def pulse(self, site: Identity) -> Pulse:
        """Return what heeds the site's signs of life that are no events."""

    async def outgoing(self, site: Identity, digest: str) -> BlobStore:
        """Return the store to send a blob from; raise `Refused` if it is none of the site's."""

    async def incoming(self, site: Identity, task: TaskId, blob: Blob) -> BlobStore | None:
        """Return the store to keep a task's update in, None if the task's was taken in already.

        Raise `Refused` if the site was not asked for it.
        """

    async def file(self, site: Identity, name: str) -> bytes:
        """Return a small named file; raise `ConfigError` if there is none."""


class EnrolmentDesk(Protocol):
    """Newcomers speak here, those whose certificate grows old, and those who leave."""

    async def join(self, request: JoinRequest) -> Admission:
        """Admit the holder of a token."""

    async def renew(self, who: Identity, csr: bytes) -> Admission:
        """Issue a fresh certificate for the same name and role."""

    async def leave(self, who: Identity) -> None:
        """Refuse every certificate and token that the caller was given so far."""


class OperationsDesk(Protocol):
    """Operators and viewers speak here; `by` is who asks, for the audit log."""

    async def submit(self, by: Identity, plan: str, starts: float = 0.0) -> RunInfo:
        """Queue a run of `plan`, canonical JSON; raise `Contradiction` with all its faults.

        It starts when there is room, and not before `starts`, in seconds since the epoch.
        """

    async def list_runs(self, by: Identity) -> Sequence[RunInfo]:
        """Return all runs, oldest first."""

    async def show_run(self, by: Identity, run: RunId) -> RunDetail:
        """Return a run with all its receipts."""

    def watch_run(self, by: Identity, run: RunId) -> AsyncGenerator[RunInfo]:
        """Yield the run now and at each change, until it ends."""

    async def stop_run(self, by: Identity, run: RunId) -> RunInfo:
        """Stop a run; what was committed stays."""

    async def resume_run(self, by: Identity, run: RunId) -> RunInfo:
        """Let a run that was stopped or failed go on from its last committed round."""

    async def list_models(self, by: Identity) -> Sequence[ModelVersion]:
        """Return all versions of all models."""

    async def show_model(self, by: Identity, model: str, version: int) -> ModelVersion:
        """Return one version."""

    async def release(self, by: Identity, model: str, version: int) -> ModelVersion:
        """Make a version live."""

    async def rollback(self, by: Identity, model: str) -> ModelVersion:
        """Make the version live that was live before."""

    async def list_sites(self, by: Identity) -> Sequence[SiteInfo]:
        """Return all sites that were ever admitted."""

    async def invite(self, by: Identity, name: str, role: Role, ttl: float) -> Invitation:
        """Mint a join token."""

    async def revoke(self, by: Identity, name: str) -> None:
        """Refuse every certificate and token that `name` was given so far."""


@dataclass(frozen=True)
class Desks:
    """What one coordinator puts behind its doors."""

    federation: FederationDesk
    operations: OperationsDesk
    enrolment: EnrolmentDesk
