"""The coordinator's journal: what happened, on disk before its effects; a restart replays it.

Parameters do not go in: a committed round's state is a file beside the journal, written before
the record that names it. Updates do not go in either: the sites keep theirs until a round is
committed, and deliver them again.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast, get_args

from fedml import durable, failpoints
from fedml.errors import ConfigError, Corrupt, MalformedMessage
from fedml.identity.receipts import Sealer, start
from fedml.params import read
from fedml.protocol.apps import AppPlan, is_app_plan
from fedml.protocol.messages import RunId
from fedml.protocol.operations import Receipt, RunState, Seal, round_of
from fedml.records import from_record, to_record
from fedml.rounds.hosting import Opened
from fedml.rounds.plan import Plan
from fedml.strategies import ServerState

UNSEALED = Seal("", "")


@dataclass(frozen=True)
class Submitted:
    """An operator's plan was accepted as a run."""

    run: RunId
    plan: str
    by: str
    at: float
    starts: float = 0.0  # not before then


@dataclass(frozen=True)
class Begun:
    """The run left the queue."""

    run: RunId
    at: float


@dataclass(frozen=True)
class Halted:
    """An operator stopped the run; what is open is given up."""

    run: RunId
    reason: str
    at: float


@dataclass(frozen=True)
class Resumed:
    """An operator let a run that had ended go on; it stands in the queue again."""

    run: RunId
    by: str
    at: float


@dataclass(frozen=True)
class RoundOpened:
    """A round is about to be sent out; `data` are the asked sites' keyed dataset digests."""

    run: RunId
    opened: Opened
    data: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundCommitted:
    """A round is over. `state` is its file's name, "" if the model did not change."""

    run: RunId
    receipt: Receipt
    state: str = ""
    seal: Seal = UNSEALED


@dataclass(frozen=True)
class Registered:
    """The run's model became a version."""

    run: RunId
    version: int


@dataclass(frozen=True)
class Ended:
    """The run is over."""

    run: RunId
    state: RunState
    detail: str


Entry = (
    Submitted | Begun | RoundOpened | RoundCommitted | Registered | Halted | Resumed | Ended
)  # fmt: skip
_KINDS = {kind.__name__: kind for kind in get_args(Entry)}


@dataclass
class History:
    """All that the journal says of one run."""

    submitted: Submitted
    read: Plan | AppPlan | Corrupt  # its plan, or why that cannot be read any more
    receipts: list[Receipt] = field(default_factory=list)
    seals: list[Seal] = field(default_factory=list)
    opened: Opened | None = None
    lapsed: bool = False  # the sites have forgotten what is open
    begun: bool = False
    due: float = 0.0  # it may not begin before then
    queued: float = 0.0  # since when it stands in the queue
    halted: str = ""  # who stopped it, until it is resumed
    forgiven: int = 0  # receipts before it was last resumed
    state: str = ""
    version: int = 0
    ended: Ended | None = None
    data: dict[str, str] = field(default_factory=dict)  # by site, as of its last round

    @property
    def plan(self) -> Plan:
        """The run's plan; raises `Corrupt` if it does not read, as without its own strategy."""
        if isinstance(self.read, Corrupt):
            raise self.read
        assert isinstance(self.read, Plan), "a run of a Flower app has an `app` instead"
        return self.read

    @property
    def app(self) -> AppPlan | None:
        """The plan of a Flower app's run, which has no other."""
        return self.read if isinstance(self.read, AppPlan) else None

    @property
    def title(self) -> tuple[str, int]:
        """The model's name and the number of rounds, also of a plan that does not read."""
        if isinstance(self.read, Plan):
            return self.read.model, self.read.rounds
        raw = json.loads(self.submitted.plan)
        return str(raw.get("model", "")), int(raw.get("rounds", 0))

    @property
    def is_over(self) -> bool:
        """True if it ended and nobody need expect it back: who stops a run may let it go on."""
        if self.ended is None:
            return False
        return bool(self.version or not self.halted or self.ended.state != "stopped")

    @property
    def carried(self) -> Mapping[str, str]:
        """The tasks that sites work on across rounds, by site: as the last receipt says."""
        for number in reversed(range(self.forgiven, len(self.receipts))):
            if self.receipts[number].kind == "train":
                return self.receipts[number].carried
        return {}

    @property
    def states(self) -> set[str]:
        """The names of the state files that the run needs to go on."""
        run = self.submitted.run
        before = {round_of(run, task) - 1 for task in self.carried.values()}
        return {state_name(run, number) for number in before if number} | ({self.state} - {""})

    @property
    def link(self) -> str:
        """What the next receipt is chained to."""
        if self.seals:
            return self.seals[-1].link
        return start(self.submitted.run, self.submitted.plan)

    def note(self, entry: Entry) -> None:
        """Take in the next entry about this run."""
        match entry:
            case Begun():
                self.begun = True
            case RoundOpened(_, opened, data):
                self.opened, self.lapsed = opened, False
                self.begun = True  # coordinators from before had no queue to leave
                self.data |= data
            case RoundCommitted(_, receipt, state, seal):
                self.receipts.append(receipt)
                self.seals.append(seal)
                if self.lapsed:  # what became of it was known when the run was resumed
                    self.forgiven = len(self.receipts)
                self.opened, self.lapsed = None, False
                self.state = state or self.state
            case Registered(_, version):
                self.version = version
            case Halted(_, reason):
                self.halted = reason
            case Resumed(_, _, at):
                self.ended, self.halted, self.begun = None, "", False
                self.due, self.queued = 0.0, at
                self.forgiven, self.lapsed = len(self.receipts), self.opened is not None
            case Ended():
                self.ended = entry
            case Submitted():
                raise AssertionError("a run begins once")


class Journal:
    """The journal of one coordinator folder; opening it replays every run. Threads may share it.

    Opening raises `Corrupt`, naming the file and the way out, if it is not what we wrote. Receipts
    are sealed by `sealer`.
    """

    def __init__(self, folder: Path, sealer: Sealer | None = None) -> None:
        self._sealer = sealer
        self._states = folder / "states"
        self._mutex, self._closed = threading.Lock(), False
        self._log = durable.Log(folder / "journal.jsonl")
        self.torn = self._log.torn
        self.runs: Mapping[RunId, History] = {}
        try:
            for record in self._log.records:
                self._note(_parse(self._log.path, record))
            for history in self.runs.values():
                if isinstance(history.read, Corrupt) and not history.is_over:
                    raise history.read
        except BaseException:
            self._log.close()
            raise

    def append(self, *entries: Entry) -> None:
        """Write `entries`, with one wait for the disk; when this returns they are on it."""
        records = [{"kind": type(entry).__name__, "entry": to_record(entry)} for entry in entries]
        with self._mutex:
            if self._closed:
                raise ConfigError(f"{self._log.path} is closed; the coordinator is going down")
            failpoints.reach("journal.append")
            self._log.append(*records)
            failpoints.reach("journal.appended")
            for entry in entries:
                self._note(entry)

    def commit(self, run: RunId, receipt: Receipt, state: Path | None, *more: Entry) -> None:
        """Write a round's end, sealed, its state first, and `more` entries that follow it at once.

        `state` is a file with the state's parts that nobody will write to: it gets a second name
        among the states. Older states of the run go that no site still works on.
        """
        name = state_name(run, receipt.round) if state else ""
        if state:
            durable.link(state, self._states / name)
            failpoints.reach("journal.state")
        history = self.runs[run]
        before = history.states
        entry = RoundCommitted(run, receipt, name)
        if self._sealer is not None:
            entry = replace(entry, seal=self._sealer.seal(history.link, receipt))
        self.append(entry, *more)
        for gone in before - history.states:
            (self._states / gone).unlink(missing_ok=True)

    def state(self, run: RunId, number: int | None = None) -> ServerState | None:
        """Return the run's last committed state, or that after round `number`; raises `Corrupt`.

        None before the first. Of older ones there are those that `History.states` names.
        """
        history = self.runs[run]
        if not history.state or number == 0:
            return None
        path = self._states / (state_name(run, number) if number else history.state)
        try:
            parts = read(path)
        except OSError as error:
            raise Corrupt(f"{path}: {error.strerror}; restore the folder from a backup") from error
        except MalformedMessage as error:
            raise Corrupt(
                f"{path} is damaged ({error}); restore the folder from a backup"
            ) from error
        models = [r.model for r in history.receipts if r.kind == "train" and r.model][:number]
        params = parts.pop("", None)
        if params is None or params.digest() != models[-1]:
            raise Corrupt(
                f"{path} is not the state that the journal names; restore the folder from a backup"
            )
        return ServerState(params, parts, step=len(models))

    def close(self) -> None:
        """Let go of the file, after a write that is under way."""
        with self._mutex:
            if not self._closed:
                self._closed = True
                self._log.close()

    def _note(self, entry: Entry) -> None:
        if not isinstance(entry, Submitted):
            if entry.run not in self.runs:
                raise Corrupt(
                    f"{self._log.path}: run {entry.run} goes on and was never submitted; "
                    "restore the folder from a backup"
                )
            self.runs[entry.run].note(entry)
        elif entry.run in self.runs:
            raise Corrupt(
                f"{self._log.path}: run {entry.run} was submitted twice; "
                "restore the folder from a backup"
            )
        else:  # a new mapping: others may be going over the old one
            queued = max(entry.at, entry.starts)
            history = History(entry, self._plan(entry), due=entry.starts, queued=queued)
            self.runs = {**self.runs, entry.run: history}

    def _plan(self, entry: Submitted) -> Plan | AppPlan | Corrupt:
        try:
            if is_app_plan(entry.plan):
                return AppPlan.from_json(entry.plan)
            return Plan.from_json(entry.plan)
        except ConfigError as error:
            return Corrupt(
                f"{self._log.path}: the plan of run {entry.run} does not read ({error}); "
                "use the fedml that wrote it, or restore the folder from a backup"
            )


def state_name(run: RunId, number: int) -> str:
    """Return the name of the file of the state after round `number`."""
    return f"{run}.{number}.safetensors"


def _parse(path: Path, record: Mapping[str, object]) -> Entry:
    kind = _KINDS.get(str(record.get("kind")))
    if kind is None:
        raise Corrupt(
            f"{path}: a record of kind {record.get('kind')!r:.60} is none of ours; use the fedml "
            "that wrote it, or restore the folder from a backup"
        )
    try:
        return cast(Entry, from_record(kind, record.get("entry"), kind.__name__))
    except ConfigError as error:
        raise Corrupt(f"{path}: {error}; restore the folder from a backup") from error
