"""The chain of records that a ledger is, on disk, and whether it is whole.

Each record names the one before it by hash, and a second small file names the last, so an edited,
shortened or forked ledger is noticed when it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from fedml import durable
from fedml.errors import Corrupt
from fedml.privacy import accounting
from fedml.privacy.accounting import Event, Unit
from fedml.protocol.messages import RunId, TaskId

Part = Literal["train", "held-out"]
State = Literal["reserved", "charged", "void"]
PARTS: tuple[Part, ...] = get_args(Part)
_UNITS: tuple[Unit, ...] = get_args(Unit)
_STATES: tuple[State, ...] = get_args(State)
START = "0" * 64  # what the first record names as the one before it
_WAY_OUT = (  # an older copy has forgotten what was spent since
    "put no backup in its place; docs/operations.md says what to do about a lost ledger"
)


@dataclass(frozen=True)
class Entry:
    """A task in the ledger: what it costs the units of `part`, and how far it has come.

    `time` is that of its last change, in seconds since the epoch. `planned` is how many such
    events its run was planned with. Ledgers from before name no recipe, and plan for 1.
    """

    task: TaskId
    run: RunId
    part: Part
    event: Event
    state: State
    time: float
    recipe: str = ""
    planned: int = 1


def first_record(name: str, unit: Unit) -> durable.Record:
    """Return what a ledger of dataset `name`, kept for each `unit`, begins with."""
    return {"kind": "ledger", "name": name, "unit": unit, "version": 1}


def to_record(entry: Entry) -> durable.Record:
    """Return `entry` as a record, not yet chained to the one before."""
    return {
        "kind": entry.state,
        "task": entry.task,
        "run": entry.run,
        "recipe": entry.recipe,
        "part": entry.part,
        "time": entry.time,
        "planned": entry.planned,
        **accounting.to_record(entry.event),
    }


def sealed(body: durable.Record, records: Sequence[durable.Record]) -> durable.Record:
    """Return `body` chained to the last of `records`, with its own hash."""
    chained = {**body, "prev": records[-1]["hash"] if records else START}
    return {**chained, "hash": _hash(chained)}


def read(path: Path) -> tuple[Entry, ...]:
    """Return a ledger's tasks, oldest first, while another process may hold it; changes nothing.

    Raises `Corrupt` if the chain of records is broken, or its end is not the one that was noted.
    """
    head = read_head(path)  # before the records: they may go on meanwhile, and never go back
    records = durable.read_log(path)
    if head is None and len(records) > 1:  # it was being made
        head, records = read_head(path), durable.read_log(path)
    check_head(path, head, records)
    return tuple(replay(path, records))


def spent(entries: Iterable[Entry], delta: float) -> float:
    """Return the epsilon, at `delta`, of those `entries` that were charged."""
    return _most((entry for entry in entries if entry.state == "charged"), delta)


def head_of(path: Path) -> Path:
    """Return where the file lies that names a ledger's last record."""
    return path.with_name(f"{path.name}.guard") / "head.json"


def read_head(path: Path) -> durable.Record | None:
    """Return what that file says, or None if it is not there."""
    head = head_of(path)
    return dict(durable.read_json(head)) if head.exists() else None


def check_head(path: Path, head: durable.Record | None, records: Sequence[durable.Record]) -> None:
    """Compare with the file that names the last record; a crash leaves it one behind."""
    if head is None:
        if len(records) > 1:
            raise Corrupt(f"{path}: {head_of(path)} is gone; {_WAY_OUT}")
        return
    count = head.get("records", 0)
    if count > len(records):
        raise Corrupt(f"{path}: {len(records)} records, there were {count}; {_WAY_OUT}")
    if count < 1 or records[count - 1].get("hash") != head.get("hash"):
        raise Corrupt(f"{path}: record {count} was replaced; {_WAY_OUT}")


def _most(entries: Iterable[Entry], delta: float) -> float:
    entries = list(entries)
    return max(
        accounting.epsilon([e.event for e in entries if e.part == part], delta) for part in PARTS
    )


def replay(path: Path, records: Iterable[durable.Record]) -> list[Entry]:
    """Check the chain and every step of every task; return where each task has got to."""
    return list({entry.task: entry for entry in steps(path, records)}.values())


def steps(path: Path, records: Iterable[durable.Record]) -> Iterator[Entry]:
    """Check the chain, and yield every step of every task as it was taken.

    Raises `Corrupt` at the first record that is not what we wrote, or not in its place.
    """
    entries: dict[TaskId, Entry] = {}
    previous = START
    for number, record in enumerate(records, 1):
        body = {name: value for name, value in record.items() if name != "hash"}
        if record.get("prev") != previous or record.get("hash") != _hash(body):
            raise Corrupt(f"{path}: record {number} breaks the chain; {_WAY_OUT}")
        previous = record["hash"]
        if number == 1:
            known = record.get("version") == 1 and record.get("unit") in _UNITS
            if record.get("kind") != "ledger" or not known:
                raise Corrupt(f"{path} is no ledger of version 1; {_WAY_OUT}")
            continue
        entry = _parse(path, record)
        _check_step(path, entries.get(entry.task), entry)
        entries[entry.task] = entry
        yield entry


def _parse(path: Path, record: durable.Record) -> Entry:
    try:
        part = PARTS[PARTS.index(record["part"])]
        state = _STATES[_STATES.index(record["kind"])]
        event = accounting.from_record(record)
        task, run = TaskId(record["task"]), RunId(record["run"])
        recipe, planned = str(record.get("recipe", "")), int(record.get("planned", 1))
        return Entry(task, run, part, event, state, float(record["time"]), recipe, planned)
    except (KeyError, ValueError, TypeError, Corrupt) as error:
        raise Corrupt(f"{path}: {error}; {_WAY_OUT}") from error


def _check_step(path: Path, before: Entry | None, after: Entry) -> None:
    allowed = {None: ["reserved"], "reserved": ["charged", "void"], "void": ["reserved"]}
    same = before is None or replace(before, state=after.state, time=after.time) == after
    if not same or after.state not in allowed.get(before.state if before else None, []):
        raise Corrupt(f"{path}: task {after.task} became {after.state} out of turn; {_WAY_OUT}")


def _hash(body: durable.Record) -> str:
    return hashlib.sha256(durable.dump_json(body)).hexdigest()
