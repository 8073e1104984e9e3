"""A ledger as its owner reads it: what was spent of how much, by whom, and for which neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedml.privacy import accounting, chain, renyi
from fedml.privacy.accounting import ADJACENCY, Unit
from fedml.privacy.chain import PARTS, Entry
from fedml.privacy.ledger import Limits


@dataclass(frozen=True)
class Statement:
    """What each `unit` of a dataset has spent of `limit`, at `delta`.

    `spent` is the largest of the parts' epsilons, by privacy loss distributions; `filtered` what a
    filter would need for all that is charged or reserved, had none of it been planned ahead.
    `runs` is what each run spent by itself; they do not add up, for events compose better.
    """

    dataset: str
    unit: Unit
    limit: float
    delta: float
    spent: float
    filtered: float
    charged: int
    reserved: int
    runs: Mapping[str, float] = field(default_factory=dict)
    adjacency: str = ADJACENCY


def state(path: Path, name: str, unit: Unit, limits: Limits) -> Statement:
    """Return the statement of a ledger that another process may hold; changes nothing.

    Raises `Corrupt` if the ledger is not what we wrote. One that is not there has spent nothing.
    """
    entries = chain.read(path) if path.exists() else ()
    held = [entry for entry in entries if entry.state != "void"]
    runs = dict.fromkeys(entry.run for entry in held)
    return Statement(
        name,
        unit,
        limits.epsilon,
        limits.delta,
        chain.spent(entries, limits.delta),
        max(_filtered(held, part, limits) for part in PARTS),
        sum(entry.state == "charged" for entry in entries),
        sum(entry.state == "reserved" for entry in entries),
        {run: chain.spent((e for e in held if e.run == run), limits.delta) for run in runs},
    )


def rows(name: str, unit: Unit, entries: Iterable[Entry]) -> Iterator[Mapping[str, object]]:
    """Yield each task of a ledger as flat values, for a spreadsheet or a script."""
    for entry in entries:
        yield {
            "dataset": name,
            "unit": unit,
            "adjacency": ADJACENCY,
            "task": entry.task,
            "run": entry.run,
            "recipe": entry.recipe,
            "part": entry.part,
            "state": entry.state,
            "time": entry.time,
            "planned": entry.planned,
            **accounting.to_record(entry.event),
        }


def _filtered(held: Iterable[Entry], part: str, limits: Limits) -> float:
    events = [entry.event for entry in held if entry.part == part]
    return renyi.epsilon(events, limits.epsilon, limits.delta)
