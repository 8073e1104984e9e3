"""What a `Run` and its host say to each other: events in, commands out."""

from __future__ import annotations

from dataclasses import dataclass

from fedml.params import Params
from fedml.protocol.messages import Scores, SiteId, TaskId
from fedml.protocol.operations import Receipt, RunState
from fedml.rounds import masked
from fedml.rounds import round as rounds
from fedml.rounds.selection import Pool, Reasons, SiteStatus
from fedml.strategies import ServerState

# --- events ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SitesChanged:
    """What the host knows of every site now; a `Pool` where they are too many to list."""

    statuses: tuple[SiteStatus, ...] | Pool


@dataclass(frozen=True)
class Tick:
    """The time asked for by a `WakeAt` has come."""

    token: str


@dataclass(frozen=True)
class StopAsked:
    """An operator wants the run to end; `reason` names who and why."""

    reason: str


@dataclass(frozen=True)
class Committed:
    """What the last `Commit` carried is on the disk, or goes there before anything else is done.

    `state` is the state that it carried as it was read back, for a host that maps its files.
    """

    state: ServerState | None = None


Event = (
    rounds.UpdateArrived | rounds.StackArrived | rounds.SumArrived
    | rounds.ReportArrived | rounds.SiteLost
    | masked.Said | SitesChanged | Tick | StopAsked | Committed
)  # fmt: skip


# --- commands ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A round opens: note it before its tasks go out, and hand it to `Run.resume` after a crash."""

    opening: rounds.Opening
    left_out: Reasons
    at: float


@dataclass(frozen=True)
class Commit:
    """Make `receipt` durable, with the `state` it led to if there is one; then feed `Committed`.

    `refused` are the missing sites that will never be asked again for this kind of work.
    """

    receipt: Receipt
    state: ServerState | None
    refused: tuple[SiteId, ...] = ()


@dataclass(frozen=True, slots=True)
class ForgetTask:
    """Tell `site` that its round is committed or void: it may delete what it kept for `task`."""

    task: TaskId
    site: SiteId


@dataclass(frozen=True)
class Candidate:
    """Register these parameters as a version. After a crash it may come again, with equal bytes."""

    params: Params
    scores: Scores
    receipts: tuple[Receipt, ...]
    detail: str


@dataclass(frozen=True)
class End:
    """The run is over; nothing follows."""

    state: RunState
    detail: str


Command = (
    rounds.SendTask | rounds.CancelTask | rounds.WakeAt | masked.Relay
    | Opened | Commit | ForgetTask | Candidate | End
)  # fmt: skip
