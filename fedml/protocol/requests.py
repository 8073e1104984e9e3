"""The envelopes of single calls: what is asked and answered besides commands and events."""

from __future__ import annotations

from dataclasses import dataclass

from fedml.errors import ConfigError
from fedml.protocol.messages import Blob, RunId, TaskId, check_digest, check_id, check_name
from fedml.protocol.operations import Role


@dataclass(frozen=True)
class JoinRequest:
    """A token's id and secret, and a certificate request (PEM) for the key to be certified."""

    id: str
    secret: str
    csr: bytes


@dataclass(frozen=True)
class RenewRequest:
    """A certificate request (PEM); name and role come from the caller's present certificate."""

    csr: bytes


@dataclass(frozen=True)
class Admission:
    """A client certificate and its authority's (PEM), and where the federation listens."""

    certificate: bytes
    ca: bytes
    address: str


@dataclass(frozen=True)
class DownloadRequest:
    """Send a blob from byte `offset` on."""

    digest: str
    offset: int

    def __post_init__(self) -> None:
        check_digest("blob", self.digest)
        if self.offset < 0:
            raise ConfigError(f"offset {self.offset}: 0 or more")


@dataclass(frozen=True)
class FetchRequest:
    """Send a small named file whole."""

    name: str


@dataclass(frozen=True)
class Chunk:
    """The next bytes, at most `codec.MAX_CHUNK`; none at all say only that the sender is there."""

    data: bytes | memoryview


@dataclass(frozen=True)
class UploadStart:
    """First part of an upload: which blob, the update of which task. Chunks wait for `Stored`."""

    blob: Blob
    task: TaskId

    def __post_init__(self) -> None:
        check_id("task", self.task)


UploadPart = UploadStart | Chunk


@dataclass(frozen=True)
class Stored:
    """How many bytes of the blob the coordinator has; the blob's size once it is verified.

    Once `go` is set the rest may come; until then it is not the sender's turn.
    """

    size: int
    go: bool


@dataclass(frozen=True)
class SubmitRequest:
    """Queue a run of this plan, as canonical JSON, from `starts` on; 0 is now."""

    plan: str
    starts: float = 0.0


@dataclass(frozen=True)
class ListRequest:
    """List all there are."""


@dataclass(frozen=True)
class RunRequest:
    """One run by id."""

    run: RunId


@dataclass(frozen=True)
class ModelRequest:
    """One version of a model."""

    model: str
    version: int

    def __post_init__(self) -> None:
        check_name("model", self.model)
        if self.version < 1:
            raise ConfigError(f"version {self.version} of {self.model}: versions start at 1")


@dataclass(frozen=True)
class RollbackRequest:
    """Go back to the version that was live before."""

    model: str

    def __post_init__(self) -> None:
        check_name("model", self.model)


@dataclass(frozen=True)
class InviteRequest:
    """Mint a join token for `name` in `role` that lives `ttl` seconds."""

    name: str
    role: Role
    ttl: float

    def __post_init__(self) -> None:
        check_name(self.role, self.name)


@dataclass(frozen=True)
class RevokeRequest:
    """Refuse every certificate issued to `name` so far."""

    name: str

    def __post_init__(self) -> None:
        check_name("name", self.name)


@dataclass(frozen=True)
class PingRequest:
    """Are you there, and what time is it?"""


@dataclass(frozen=True)
class Pong:
    """The coordinator's clock, in seconds since the epoch, and its version."""

    time: float
    version: str


@dataclass(frozen=True)
class LeaveRequest:
    """The caller, a site, leaves: refuse its certificates from now on."""


@dataclass(frozen=True)
class Done:
    """It is done; there is nothing to add."""
