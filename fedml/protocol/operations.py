"""What operators ask of a coordinator, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedml.protocol.messages import DatasetCard, RunId, Scores, Serving, SiteId

RunState = Literal[
    "scheduled", "queued", "waiting", "running", "evaluating", "done", "failed", "stopped"
]
Role = Literal["site", "region", "operator", "viewer"]


@dataclass(frozen=True, slots=True)
class Counted:
    """A site whose update entered a round: its weight, update digest, epsilon spent so far."""

    site: SiteId
    weight: float
    digest: str
    epsilon: float


@dataclass(frozen=True)
class Receipt:
    """A round's fate: who was asked, who counted, who did not and why, and what came of it.

    `left_out` are sites that were not asked, with the reason; `model` is the digest of the
    parameters after the round, "" if it failed; times are seconds since the epoch. An evaluation
    leaves a receipt of its own, with `scores` and the digest of what was scored. `damped` are
    those of the counted that a robust reducer let count for little, with the reason. `about` says
    what a Flower app asked, whose exchanges are no rounds: the model is the question's, and who
    answered has counted. In a run that takes updates as they come `stale` are those of the counted
    whose update answers a task of an earlier round, and `carried` those of the asked who still
    work on theirs, each with the task. A field that is added later must be empty by default, or
    older seals do not fit (`identity.receipts`).
    """

    run: RunId
    round: int
    attempt: int
    asked: tuple[SiteId, ...]
    counted: tuple[Counted, ...]
    missing: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    metrics: Scores = field(default_factory=dict)
    scores: Scores = field(default_factory=dict)
    model: str = ""
    opened: float = 0.0
    closed: float = 0.0
    kind: Literal["train", "evaluate"] = "train"
    damped: Mapping[str, str] = field(default_factory=dict)
    about: str = ""
    stale: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, str] = field(default_factory=dict)

    def staleness(self, site: str) -> int:
        """Return how many rounds before this one the model was sent that `site` answered to."""
        task = self.stale.get(site)
        return self.round - round_of(self.run, task) if task else 0


def round_of(run: RunId, task: str) -> int:
    """Return the round of a training task, whose id is `run.round.attempt.site`."""
    return int(task.removeprefix(f"{run}.").partition(".")[0])


@dataclass(frozen=True, slots=True)
class Seal:
    """What makes a receipt hard to change: the hash that chains it to those before, signed."""

    link: str
    signature: str  # of the link; both in hex


@dataclass(frozen=True)
class RunInfo:
    """A run in one line. `version` is the model version it registered, 0 if none yet.

    `starts` is when it may start, in seconds since the epoch; 0 for as soon as there is room.
    """

    id: RunId
    model: str
    state: RunState
    round: int
    rounds: int
    submitted: float
    detail: str = ""
    version: int = 0
    scores: Scores = field(default_factory=dict)
    starts: float = 0.0


@dataclass(frozen=True)
class RunDetail:
    """A run with its plan, as canonical JSON, and all its receipts, each with its seal.

    `sealer` is the certificate (PEM) of the key that signed them. `result` is what a Flower app
    came to, as JSON, once it is over.
    """

    info: RunInfo
    plan: str
    receipts: tuple[Receipt, ...] = ()
    seals: tuple[Seal, ...] = ()
    sealer: str = ""
    result: str = ""


@dataclass(frozen=True)
class ModelVersion:
    """A registered version. `manifest` is its lineage as canonical JSON."""

    model: str
    version: int
    run: RunId
    state: Literal["candidate", "live", "withdrawn"]
    digest: str
    created: float
    scores: Scores = field(default_factory=dict)
    epsilon: Mapping[str, float] = field(default_factory=dict)  # by site
    manifest: str = ""


@dataclass(frozen=True)
class SiteInfo:
    """What the coordinator knows of a site; `seen` is in seconds since the epoch, 0 for never.

    `region` is the regional coordinator that it is reached through, "" if it dials us itself.
    """

    site: SiteId
    connected: bool
    seen: float
    device: str = ""
    version: str = ""
    datasets: tuple[DatasetCard, ...] = ()
    serving: tuple[Serving, ...] = ()
    region: str = ""


@dataclass(frozen=True)
class Invitation:
    """A join token, shown once; it dies at `expires`, seconds since the epoch."""

    token: str
    name: str
    role: Role
    expires: float
