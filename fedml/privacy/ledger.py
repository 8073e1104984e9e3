"""What a dataset's rows have spent, on disk before anything leaves the site.

One file for each dataset and privacy unit; `chain` has its records. A task is reserved before work
begins, charged before its result leaves, and never charged twice. One process at a time holds a
ledger; `chain.read` lets others look.

A row lies in one part only, either trained on or held out, so the dataset's epsilon is the largest
of its parts'. Whoever chooses the next run has seen what the last one gave, so the limit, and the
caps of a run and of a recipe, are held by a filter: `renyi` says what it proves. What was spent is
reported as the epsilon of all events together, re-read as if they had been fixed ahead, and for
neighbours that differ by one unit, there or not.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedml import durable, failpoints
from fedml.errors import BudgetExhausted, ConfigError, Refused, Untrusted
from fedml.privacy import chain
from fedml.privacy.accounting import Event, Unit
from fedml.privacy.chain import Entry, Part, State
from fedml.privacy.renyi import Filter, Pledge
from fedml.protocol.messages import RunId, TaskId

_KEYS: Mapping[Unit, str] = {  # of a policy's dataset
    "record": "epsilon",
    "patient": "epsilon",
    "site": "site_epsilon",
}


@dataclass(frozen=True)
class Limits:
    """What a policy grants each unit, at `delta`: for its lifetime, to one run, to one recipe."""

    epsilon: float
    delta: float
    run: float = math.inf
    recipe: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.epsilon >= 0 and 0 < self.delta < 1):
            raise ConfigError(f"limit {self.epsilon}, delta {self.delta}: 0 or more, in (0, 1)")


class Ledger:
    """The budget of one dataset, for one kind of unit; safe to share between threads.

    Opening raises `Corrupt` if the file is not what we wrote, and `ConfigError` if another
    process holds it or it belongs to another dataset or unit.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        limits: Limits,
        unit: Unit = "record",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path, self.name, self.limits, self.unit = path, name, limits, unit
        self._clock, self._mutex, self._open = clock, threading.RLock(), ExitStack()
        self._head = chain.head_of(path)
        self._entries: dict[TaskId, Entry] = {}
        self._filters: defaultdict[tuple[str, ...], Filter] = defaultdict(Filter)
        self._open.enter_context(durable.lock(self._head.parent, f"ledger of {name}"))
        try:
            self._log = durable.Log(path)
            self._open.callback(self._log.close)
            chain.check_head(path, chain.read_head(path), self._log.records)
            for entry in chain.steps(path, self._log.records):
                self._take_in(entry)
            self._start()
        except BaseException:
            self._open.close()
            raise

    def reserve(
        self,
        task: TaskId,
        run: RunId,
        part: Part,
        event: Event,
        *,
        planned: int = 1,
        recipe: str = "",
    ) -> None:
        """Set the cost of `task` aside, durably, unless that would break a limit.

        `planned` is how many such events the run's plan has. A limit counts all that is charged
        or reserved, then this. Raises `BudgetExhausted`, naming the policy's line and having
        written nothing. Doing it twice is doing it once; the same id with another run, part or
        event raises `Untrusted`.
        """
        with self._mutex:
            known = self._entries.get(task)
            if known and (known.run, known.part, known.event) != (run, part, event):
                raise Untrusted(
                    f"{self.name}: task {task} is in the ledger as {known.event} for run "
                    f"{known.run}, and now claims {event} for run {run}; refuse the coordinator"
                )
            if known and known.state != "void":
                return
            entry = known or Entry(task, run, part, event, "reserved", 0.0, recipe, planned)
            self._check_limits(entry)
            self._move(entry, "reserved")

    def charge(self, task: TaskId) -> None:
        """Make the reservation of `task` final; when this returns, its result may leave.

        Charging twice is one charge. Raises `Refused` if nothing is reserved for the task.
        """
        with self._mutex:
            entry = self._entries.get(task)
            if entry is None or entry.state == "void":
                raise Refused(f"{self.name}: nothing is reserved for task {task}; reserve first")
            if entry.state == "reserved":
                self._move(entry, "charged")

    def void(self, task: TaskId) -> bool:
        """Give the reservation of `task` back; false if it is charged already, or unknown."""
        with self._mutex:
            entry = self._entries.get(task)
            if entry is None or entry.state != "reserved":
                return False
            self._move(entry, "void")
            return True

    def spent(self, *, run: RunId | None = None) -> float:
        """Return the epsilon of what was charged, by `run` alone or by all of them together."""
        with self._mutex:
            entries = [e for e in self._entries.values() if run is None or e.run == run]
        return chain.spent(entries, self.limits.delta)

    def is_charged(self, task: TaskId) -> bool:
        """True if the task's result may leave, or has left."""
        with self._mutex:
            return task in self._entries and self._entries[task].state == "charged"

    def reserved(self) -> tuple[TaskId, ...]:
        """Return the tasks whose cost is set aside and not charged, oldest first."""
        with self._mutex:
            return tuple(e.task for e in self._entries.values() if e.state == "reserved")

    def close(self) -> None:
        """Let go of the file, so that another process may open it."""
        self._open.close()

    def _check_limits(self, entry: Entry) -> None:
        pledge, delta = _pledge(entry), self.limits.delta
        for group, limit, whose, key in self._limits_of(entry):
            held = self._filters[group]
            if not held.fits(pledge, limit, delta):
                charged = [e for e in self._entries.values() if group in _groups(e)]
                raise BudgetExhausted(
                    f"{self.name}, {whose}",
                    chain.spent(charged, delta),
                    held.need(pledge, limit, delta),
                    limit,
                    f"datasets.{self.name}.{key}",
                )

    def _limits_of(self, entry: Entry) -> Iterator[tuple[tuple[str, ...], float, str, str]]:
        """Yield each limit that holds for a task: what it sums up, how much, of whom, its key."""
        units = {"record": "rows", "patient": "patients"}
        whose = f"{entry.part} {units[self.unit]}" if self.unit in units else "the site as a whole"
        life, of_run, of_recipe = _groups(entry)
        yield life, self.limits.epsilon, whose, _KEYS[self.unit]
        if self.limits.run < math.inf:
            yield of_run, self.limits.run, f"{whose}, run {entry.run}", "run_epsilon"
        cap = self.limits.recipe.get(entry.recipe)
        if cap is not None:
            key = f"recipe_epsilon.{entry.recipe}"
            yield of_recipe, cap, f"{whose}, recipe {entry.recipe}", key

    def _start(self) -> None:
        if not self._log.records:
            self._append(chain.first_record(self.name, self.unit))
        first = self._log.records[0]
        if first["name"] != self.name:
            raise ConfigError(
                f"{self.path} is the ledger of {first['name']!r}, not of {self.name!r}; "
                "give each dataset its own"
            )
        if first["unit"] != self.unit:
            raise ConfigError(
                f"{self.path} counts what each {first['unit']} has spent, the policy now says "
                f"{self.unit}: give the rows a dataset of another name"
            )

    def _move(self, entry: Entry, state: State) -> None:
        moved = replace(entry, state=state, time=self._clock())
        self._append(chain.to_record(moved), moved)

    def _append(self, record: durable.Record, entry: Entry | None = None) -> None:
        failpoints.reach("ledger.append")
        self._log.append(chain.sealed(record, self._log.records))
        if entry is not None:  # before the head, which a full disk may keep one behind
            self._take_in(entry)
        failpoints.reach("ledger.appended")
        head = {"records": len(self._log.records), "hash": self._log.records[-1]["hash"]}
        durable.replace(self._head, durable.dump_json(head), mode=0o600)

    def _take_in(self, entry: Entry) -> None:
        """Note a step of a task, as it stands on the disk."""
        self._entries[entry.task] = entry
        for group in _groups(entry):
            held = self._filters[group]
            match entry.state:
                case "reserved":
                    held.hold(entry.task, _pledge(entry))
                case "charged":
                    held.answer()
                case "void":
                    held.give_back(entry.task)


def _pledge(entry: Entry) -> Pledge:
    return Pledge(entry.run, entry.event, entry.planned)


def _groups(entry: Entry) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return what an entry is summed up in: a part's life, its share of a run, of a recipe."""
    return (entry.part,), (entry.part, "run", entry.run), (entry.part, "recipe", entry.recipe)
