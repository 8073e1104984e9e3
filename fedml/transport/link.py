"""The doors to a coordinator: a site's and an operator's.

gRPC in production (`transport.rpc`), in process for tests and demos (`transport.memory`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from fedml.protocol.messages import Blob, Command, Hello, RunId, SiteEvent, TaskId
from fedml.protocol.operations import Invitation, ModelVersion, Role, RunDetail, RunInfo, SiteInfo
from fedml.protocol.requests import Admission, Pong
from fedml.transport.chunks import BlobStore

SILENCE = 30.0  # seconds that the coordinator may be silent, until it says more


class Link(Protocol):
    """A site's way to the coordinator.

    Any call may raise `Unreachable`, after which `connect` again is right; how soon is up to
    the caller. `Refused` and `PermissionDenied` are final. A cancelled `receive` or `send` (a
    timeout around it, say) may have hung up: `connect` again.
    """

    async def connect(self, hello: Hello) -> None:
        """Open the stream; an open one is given up. The coordinator's `Welcome` comes first."""

    async def receive(self, silence: float = SILENCE) -> Command:
        """Wait for the next command.

        Raises `Unreachable` once the stream is down, or the coordinator was silent for `silence`
        seconds; what comes of a download is no silence, see `Pulse`.
        """

    async def send(self, event: SiteEvent) -> None:
        """Send an event; that it arrived is only known from what the coordinator does next."""

    async def download(self, blob: Blob, into: BlobStore) -> None:
        """Get a blob, from what `into` already has of it on; raises `Untrusted` on a wrong one."""

    async def upload(self, blob: Blob, source: BlobStore, task: TaskId) -> None:
        """Hand in a task's update, from what the coordinator already has of it on."""

    async def fetch(self, name: str, limit: int) -> bytes:
        """Return a small named file; raises `ConfigError` if there is none of that name.

        Raises `Untrusted` if it is longer than `limit` bytes.
        """

    async def renew(self, csr: bytes) -> Admission:
        """Get a fresh certificate for the same name and role, for the key in `csr` (PEM)."""

    async def ping(self) -> Pong:
        """Ask for the coordinator's clock and version."""

    async def leave(self) -> None:
        """Leave the federation: our certificates are refused from now on."""

    async def close(self) -> None:
        """Hang up; `connect` opens it again."""


class Operations(Protocol):
    """An operator's way to the coordinator; see `OperationsDesk` for what each call promises."""

    async def submit(self, plan: str, starts: float = 0.0) -> RunInfo:
        """Queue a run of `plan`, canonical JSON, from `starts` on."""

    async def list_runs(self) -> Sequence[RunInfo]:
        """Return all runs."""

    async def show_run(self, run: RunId) -> RunDetail:
        """Return a run with all its receipts."""

    def watch_run(self, run: RunId) -> AsyncGenerator[RunInfo]:
        """Yield the run now and at each change, until it ends."""

    async def stop_run(self, run: RunId) -> RunInfo:
        """Stop a run after the last committed round."""

    async def resume_run(self, run: RunId) -> RunInfo:
        """Let a run that was stopped or failed go on from its last committed round."""

    async def list_models(self) -> Sequence[ModelVersion]:
        """Return all versions of all models."""

    async def show_model(self, model: str, version: int) -> ModelVersion:
        """Return one version."""

    async def release(self, model: str, version: int) -> ModelVersion:
        """Make a version live."""

    async def rollback(self, model: str) -> ModelVersion:
        """Make the version live that was live before."""

    async def list_sites(self) -> Sequence[SiteInfo]:
        """Return all sites."""

    async def invite(self, name: str, role: Role, ttl: float) -> Invitation:
        """Mint a join token that lives `ttl` seconds."""

    async def revoke(self, name: str) -> None:
        """Refuse every certificate and token that `name` was given so far."""

    async def close(self) -> None:
        """Hang up."""
