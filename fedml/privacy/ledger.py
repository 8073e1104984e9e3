"""What a dataset's rows have spent, on disk before anything leaves the site.

One file for each dataset and privacy unit. Each record names the one before it by hash, and a
second small file names the last, so an edited, shortened or forked ledger is noticed when it is
opened. A task is reserved before work begins, charged before its result leaves, and never
charged twice. One process at a time holds a ledger; `read` lets others look.

Epsilon of a part is that of all its events together. A row lies in one part only, either
trained on or held out, so the dataset's epsilon is the largest of its parts'.

The events are taken as fixed ahead of the answers they gave, as a run's plan fixes them. An
operator who tunes one run after another on the same rows should keep the limit well below
what would harm.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedml import durable, failpoints
from fedml.errors import BudgetExhausted, ConfigError, Corrupt, Refused, Untrusted
from fedml.privacy import accounting
from fedml.privacy.accounting import Event, Unit
from fedml.protocol.messages import RunId, TaskId

Part = Literal["train", "held-out"]
State = Literal["reserved", "charged", "void"]
_PARTS: tuple[Part, ...] = ("train", "held-out")
_STATES: tuple[State, ...] = ("reserved", "charged", "void")
_START = "0" * 64  # what the first record names as the one before it
_WAY_OUT = (  # an older copy has forgotten what was spent since
    "put no backup in its place; docs/operations.md says what to do about a lost ledger"
)
_SLACK = 1e-9  # of epsilon: sums of floats may pass a limit by rounding


@dataclass(frozen=True)
class Entry:
    """A task in the ledger: what it costs the rows of `part`, and how far it has come.

    `time` is that of its last change, in seconds since the epoch.
    """

    task: TaskId
    run: RunId
    part: Part
    event: Event
    state: State
    time: float


class Ledger:
    """The budget of one dataset; safe to share between threads.

    `limit_epsilon` at `delta` is what the site's policy grants each `unit` for the file's lifetime.
    Opening raises `Corrupt` if the file is not what we wrote, and `ConfigError` if another
    process holds it or it belongs to another dataset.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        limit_epsilon: float,
        delta: float,
        unit: Unit = "record",
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not (limit_epsilon >= 0 and 0 < delta < 1):
            raise ConfigError(f"{name}: limit {limit_epsilon}, delta {delta}: 0 or more, in (0, 1)")
        self.path, self.name, self.limit, self.delta = path, name, limit_epsilon, delta
        self.unit = unit
        self._clock, self._mutex, self._open = clock, threading.RLock(), ExitStack()
        self._head = _head_of(path)
        self._open.enter_context(durable.lock(self._head.parent, f"ledger of {name}"))
        try:
            self._log = durable.Log(path)
            self._open.callback(self._log.close)
            _check_head(path, _read_head(path), self._log.records)
            self._entries = {entry.task: entry for entry in _replay(path, self._log.records)}
            self._start()
        except BaseException:
            self._open.close()
            raise

    def reserve(self, task: TaskId, run: RunId, part: Part, event: Event) -> None:
        """Set the cost of `task` aside, durably, unless that would break the limit.

        The limit counts all that is charged or reserved in `part`, then this. Raises
        `BudgetExhausted`, having written nothing. Doing it twice is doing it once; the same id
        with another run, part or event raises `Untrusted`.
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
            held = [e.event for e in self._entries.values() if e.part == part and e.state != "void"]
            asked = accounting.epsilon([*held, event], self.delta)
            if asked > self.limit + _SLACK:
                spent = accounting.epsilon(held, self.delta)
                raise BudgetExhausted(f"{self.name}, {part} rows", spent, asked, self.limit)
            self._write(Entry(task, run, part, event, "reserved", self._clock()))

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
        return spent(entries, self.delta)

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

    def _start(self) -> None:
        if not self._log.records:
            self._append({"kind": "ledger", "name": self.name, "unit": self.unit, "version": 1})
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
        self._write(
            Entry(entry.task, entry.run, entry.part, entry.event, state, self._clock()),
        )

    def _write(self, entry: Entry) -> None:
        self._append(
            {
                "kind": entry.state,
                "task": entry.task,
                "run": entry.run,
                "part": entry.part,
                "time": entry.time,
                **accounting.to_record(entry.event),
            },
            entry,
        )

    def _append(self, record: durable.Record, entry: Entry | None = None) -> None:
        records = self._log.records
        chained = {**record, "prev": records[-1]["hash"] if records else _START}
        failpoints.reach("ledger.append")
        self._log.append({**chained, "hash": _hash(chained)})
        if entry is not None:  # before the head, which a full disk may keep one behind
            self._entries[entry.task] = entry
        failpoints.reach("ledger.appended")
        head = {"records": len(self._log.records), "hash": self._log.records[-1]["hash"]}
        durable.replace(self._head, durable.dump_json(head), mode=0o600)


def read(path: Path) -> tuple[Entry, ...]:
    """Return a ledger's tasks, oldest first, while another process may hold it; changes nothing.

    Raises `Corrupt` if the chain of records is broken, or its end is not the one that was noted.
    """
    head = _read_head(path)  # before the records: they may go on meanwhile, and never go back
    records = durable.read_log(path)
    if head is None and len(records) > 1:  # it was being made
        head, records = _read_head(path), durable.read_log(path)
    _check_head(path, head, records)
    return tuple(_replay(path, records))


def spent(entries: Iterable[Entry], delta: float) -> float:
    """Return the epsilon, at `delta`, of those `entries` that were charged."""
    return _epsilon((entry for entry in entries if entry.state == "charged"), delta)


def _head_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.guard") / "head.json"


def _read_head(path: Path) -> durable.Record | None:
    head = _head_of(path)
    return dict(durable.read_json(head)) if head.exists() else None


def _check_head(path: Path, head: durable.Record | None, records: Sequence[durable.Record]) -> None:
    """Compare with the file that names the last record; a crash leaves it one behind."""
    if head is None:
        if len(records) > 1:
            raise Corrupt(f"{path}: {_head_of(path)} is gone; {_WAY_OUT}")
        return
    count = head.get("records", 0)
    if count > len(records):
        raise Corrupt(f"{path}: {len(records)} records, there were {count}; {_WAY_OUT}")
    if count < 1 or records[count - 1].get("hash") != head.get("hash"):
        raise Corrupt(f"{path}: record {count} was replaced; {_WAY_OUT}")


def _epsilon(entries: Iterable[Entry], delta: float) -> float:
    entries = list(entries)
    return max(
        accounting.epsilon([e.event for e in entries if e.part == part], delta) for part in _PARTS
    )


def _replay(path: Path, records: Iterable[durable.Record]) -> list[Entry]:
    """Check the chain and every step of every task; return where each task has got to."""
    entries: dict[TaskId, Entry] = {}
    previous = _START
    for number, record in enumerate(records, 1):
        body = {name: value for name, value in record.items() if name != "hash"}
        if record.get("prev") != previous or record.get("hash") != _hash(body):
            raise Corrupt(f"{path}: record {number} breaks the chain; {_WAY_OUT}")
        previous = record["hash"]
        if number == 1:
            if record.get("kind") != "ledger" or record.get("version") != 1:
                raise Corrupt(f"{path} is no ledger of version 1; {_WAY_OUT}")
            continue
        entry = _parse(path, record)
        _check_step(path, entries.get(entry.task), entry)
        entries[entry.task] = entry
    return list(entries.values())


def _parse(path: Path, record: durable.Record) -> Entry:
    try:
        part = _PARTS[_PARTS.index(record["part"])]
        state = _STATES[_STATES.index(record["kind"])]
        event = accounting.from_record(record)
        task, run = TaskId(record["task"]), RunId(record["run"])
        return Entry(task, run, part, event, state, float(record["time"]))
    except (KeyError, ValueError, TypeError, Corrupt) as error:
        raise Corrupt(f"{path}: {error}; {_WAY_OUT}") from error


def _check_step(path: Path, before: Entry | None, after: Entry) -> None:
    allowed = {None: ["reserved"], "reserved": ["charged", "void"], "void": ["reserved"]}
    same = before is None or (before.event, before.part, before.run) == (
        after.event,
        after.part,
        after.run,
    )
    if not same or after.state not in allowed.get(before.state if before else None, []):
        raise Corrupt(f"{path}: task {after.task} became {after.state} out of turn; {_WAY_OUT}")


def _hash(body: durable.Record) -> str:
    return hashlib.sha256(durable.dump_json(body)).hexdigest()
