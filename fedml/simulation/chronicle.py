"""What happens to a simulation, noted as it happens: for the eye, the table and a resumption."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from fedml.params import Params
from fedml.protocol.messages import RunId
from fedml.rounds import Commit, Plan, Run
from fedml.rounds.round import Kind
from fedml.simulation.checkpoint import Checkpoints
from fedml.simulation.executors.base import Memory
from fedml.simulation.flight import Due, Flight
from fedml.simulation.results import Entry
from fedml.simulation.witness import Witness
from fedml.strategies import ServerState

_RUN = RunId("simulation")


@dataclass
class Chronicle:
    """Watches the commits of one run; `tell` is told of each.

    First `begin`, then `follow`. When rounds take longer than `checkpoints.least` seconds, each
    commit is on the disk before the next round opens.
    """

    checkpoints: Checkpoints
    tell: Callable[[Entry], None] = lambda entry: None
    memory: Memory = field(default_factory=Memory)
    entries: list[Entry] = field(default_factory=list)
    flight: Flight = field(default_factory=Flight)  # the engine's
    now: float = 0.0  # virtual time at which the run begins or goes on
    _barred: dict[Kind, dict[str, str]] = field(
        default_factory=lambda: {"train": {}, "evaluate": {}}
    )
    _witness: Witness | None = None
    _state: ServerState | None = None  # after the last commit
    _aloft: tuple[Due, ...] = ()  # what was carried over then
    _unkept: bool = False  # the last commit is not on the disk, and may go there
    _stopping: bool = False
    _since: float = 0.0

    def begin(self, plan: Plan, params: Params) -> Run:
        """Return the run: from its last checkpoint, or a fresh one that starts from `params`."""
        saved = self.checkpoints.saved
        if saved is None:
            return Run.begin(_RUN, plan, params)
        self.memory, self.entries, self.now = saved.memory, list(saved.entries), saved.now
        self._barred = {kind: dict(reasons) for kind, reasons in saved.barred.items()}
        receipts = [entry.receipt for entry in saved.entries]
        run = Run.resume(_RUN, plan, saved.state, receipts, barred=saved.barred)
        self.flight.dues.update({due.task.id: due for due in saved.flight})
        run.flight.briefs.update({due.task.round: due.task.brief for due in saved.flight})
        return run

    def follow(self, run: Run, witness: Witness) -> None:
        """Note from now on what becomes of `run`, and what `witness` sees of its sites."""
        self._state, self._witness = run.state, witness
        self._since = time.perf_counter()

    def note(self, commit: Commit) -> None:
        """Take in a commit; raises `KeyboardInterrupt` if `stop` was asked for and it is kept."""
        assert self._witness is not None, "follow() comes first"
        receipt, seconds = commit.receipt, time.perf_counter() - self._since
        self.entries.append(Entry(receipt, self._witness.take(), seconds))
        self._barred[receipt.kind].update({s: receipt.missing[s] for s in commit.refused})
        self._state = commit.state or self._state
        if receipt.kind == "train":
            self._aloft = self.flight.carried(receipt.carried)
        # a failed attempt is played again rather than kept: its receipt does not say what is next
        self._unkept = commit.state is not None or receipt.kind == "evaluate"
        self.tell(self.entries[-1])
        if self._stopping or self.checkpoints.is_due:
            self.keep()
        if self._stopping and not self._unkept:
            raise KeyboardInterrupt
        self._since = time.perf_counter()

    def stop(self) -> bool:
        """Ask for a stop at the next commit; True if stopping right now loses nothing."""
        self._stopping = True
        return not self._unkept

    def keep(self) -> None:
        """Put the last commit on the disk, unless it is there or cannot be gone on from."""
        if self._unkept and self._state is not None:
            self.checkpoints.save(self._state, self.entries, self.memory, self._barred, self._aloft)
            self._unkept = False
