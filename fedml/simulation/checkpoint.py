"""What a simulation keeps on the disk, so that `kill -9` costs it at most a second of work.

A checkpoint is a state file (parameters, the algorithm's slots, what sites remember) and a record
in a log that names it, in this order, so that a crash in between leaves the checkpoint before.
Cohorts, delays, batches and populations are functions of seed and round: rounds that were
committed after the last checkpoint are simply played again, to the same bytes. Privacy noise is
not seeded, by design: under privacy, what is played again differs.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from fedml import durable
from fedml.errors import Corrupt, FedmlError
from fedml.params import Params, encode, read
from fedml.protocol.messages import RunId, SiteId
from fedml.protocol.operations import Counted, Receipt
from fedml.protocol.tasks import Slots
from fedml.rounds.run import Barred
from fedml.simulation import flight as flying
from fedml.simulation.executors.base import Memory
from fedml.simulation.flight import Due
from fedml.simulation.results import Entry
from fedml.simulation.witness import Seen
from fedml.strategies import ServerState

_MEMORY = "memory/"  # before the names of sites' slots, in a state file
_COST = 20  # a checkpoint may take this fraction of the time since the last one
Record = dict[str, Any]  # JSON; this module alone gives it meaning


@dataclass(frozen=True)
class Saved:
    """Where a simulation stood at its last checkpoint; `now` is its virtual time."""

    state: ServerState
    entries: tuple[Entry, ...]
    memory: Memory
    barred: Barred
    now: float
    flight: tuple[Due, ...] = ()  # the tasks that are carried over


@dataclass
class Checkpoints:
    """The checkpoints of one simulation, in `folder`.

    Opening it reads the last one, if any, into `saved`. Raises `Corrupt` if it is damaged.
    """

    folder: Path
    least: float = 1.0  # seconds between two checkpoints; 0 for one at each commit
    saved: Saved | None = None
    _log: durable.Log = field(init=False)
    _kept: int = 0  # entries that the log holds
    _releases: dict[tuple[SiteId, str], int] = field(default_factory=dict)
    _number: int = 0
    _due: float = 0.0

    def __post_init__(self) -> None:
        self._log = durable.Log(self.folder / "rounds.jsonl")
        if self._log.records:
            self.saved = self._read()
            self._kept = len(self.saved.entries)
            self._releases = dict(self.saved.memory.releases)
            self._number = len(self._log.records)
        self._due = time.monotonic() + self.least

    @property
    def is_due(self) -> bool:
        """True if enough time has passed since the last one, seen what one costs."""
        return time.monotonic() >= self._due

    def save(
        self,
        state: ServerState,
        entries: Sequence[Entry],
        memory: Memory,
        barred: Barred,
        flight: Sequence[Due] = (),
    ) -> None:
        """Keep where the simulation stands after the commit of `entries[-1]`; atomic."""
        begun = time.monotonic()
        name = f"state-{self._number % 2}.safetensors"  # never the one the last record names
        stacked, sites = _stack(memory.slots, state.params)
        slots = {f"slot/{slot}": params for slot, params in state.slots.items()}
        briefs, aloft = flying.described(flight)
        pieces = encode({"": state.params, **slots, **stacked, **briefs})
        durable.replace(self.folder / name, *pieces)
        spent = {key: n for key, n in memory.releases.items() if self._releases.get(key) != n}
        self._log.append(
            {
                "state": name,
                "digest": _digest(pieces),
                "step": state.step,
                "sites": sites,
                **aloft,
                "barred": {kind: dict(reasons) for kind, reasons in barred.items()},
                "releases": [[site, kind, count] for (site, kind), count in spent.items()],
                "entries": [_record(entry) for entry in entries[self._kept :]],
            }
        )
        self._releases, self._kept = dict(memory.releases), len(entries)
        self._number += 1
        now = time.monotonic()
        self._due = now + max(self.least, _COST * (now - begun) if self.least else 0.0)

    def close(self) -> None:
        """Let go of the folder."""
        self._log.close()

    def _read(self) -> Saved:
        records, last = self._log.records, self._log.records[-1]
        path = self.folder / str(last["state"])
        try:
            if _digest([path.read_bytes()]) != last["digest"]:
                raise Corrupt("it is not the state that the log names")
            parts = read(path)
            entries = tuple(_entry(raw) for record in records for raw in record["entries"])
            params = parts.pop("")
            slots = {
                name.removeprefix("slot/"): part
                for name, part in parts.items()
                if not name.startswith((_MEMORY, flying.PLACE))
            }
            memory = Memory(_unstack(last["sites"], parts, params), _fold(records))
            flight = flying.read(last, parts)
        except (OSError, KeyError, TypeError, ValueError, FedmlError) as error:
            raise Corrupt(f"{path}: {error}; begin the simulation anew") from error
        state = ServerState(params, slots, int(last["step"]))
        barred = cast(Barred, last["barred"])
        return Saved(state, entries, memory, barred, _now(entries), flight)


def _digest(pieces: Iterable[bytes | memoryview]) -> str:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()


def _now(entries: Sequence[Entry]) -> float:
    return entries[-1].receipt.closed if entries else 0.0


def _fold(records: Iterable[durable.Record]) -> dict[tuple[SiteId, str], int]:
    return {
        (SiteId(site), kind): int(count)
        for record in records
        for site, kind, count in record["releases"]
    }


# --- what sites remember: a matrix [sites, numbers] for each slot and dtype ----------------------


def _stack(
    slots: Mapping[SiteId, Slots], like: Params
) -> tuple[dict[str, Params], dict[str, list[str]]]:
    """Return parts of a state file, and for each slot the sites in the order of its rows."""
    sites: dict[str, list[SiteId]] = {}
    for site, kept in slots.items():
        for slot, params in kept.items():
            like.check_like(params)
            sites.setdefault(slot, []).append(site)
    parts = {
        _MEMORY + slot: Params(
            {
                str(dtype).removeprefix("torch."): torch.stack(
                    [slots[site][slot].buffers[dtype].cpu() for site in owners]
                )
                for dtype in like.buffers
            }
        )
        for slot, owners in sites.items()
    }
    return parts, {slot: [str(site) for site in owners] for slot, owners in sites.items()}


def _unstack(
    sites: Mapping[str, Sequence[str]], parts: Mapping[str, Params], like: Params
) -> dict[SiteId, Slots]:
    found: dict[SiteId, dict[str, Params]] = {}
    for slot, owners in sites.items():
        matrix = parts[_MEMORY + slot]
        for row, site in enumerate(owners):
            buffers = {
                dtype: matrix[str(dtype).removeprefix("torch.")][row] for dtype in like.buffers
            }
            found.setdefault(SiteId(site), {})[slot] = Params.over(like.layout, buffers)
    return dict(found)


# --- entries as JSON: columns, for a cohort of hundreds is written in well under a millisecond ----


def _record(entry: Entry) -> Record:
    receipt = entry.receipt
    counted = receipt.counted
    grouped: dict[str, list[str]] = {}
    for site, reason in receipt.left_out.items():
        grouped.setdefault(reason, []).append(site)
    return {
        "run": receipt.run,
        "round": receipt.round,
        "attempt": receipt.attempt,
        "kind": receipt.kind,
        "asked": list(receipt.asked),
        "site": [one.site for one in counted],
        "weight": [one.weight for one in counted],
        "digest": [one.digest for one in counted],
        "epsilon": [one.epsilon for one in counted],
        "missing": dict(receipt.missing),
        "left_out": grouped,
        "damped": dict(receipt.damped),
        **({"stale": dict(receipt.stale)} if receipt.stale else {}),
        **({"carried": dict(receipt.carried)} if receipt.carried else {}),
        "metrics": dict(receipt.metrics),
        "scores": dict(receipt.scores),
        "model": receipt.model,
        "opened": receipt.opened,
        "closed": receipt.closed,
        "seconds": entry.seconds,
        "seen": {
            site: [_finite(one.metrics), _finite(one.scores), one.down, one.up, one.seconds]
            for site, one in entry.seen.items()
        },
    }


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _entry(raw: Mapping[str, Any]) -> Entry:
    columns = (raw[name] for name in ("site", "weight", "digest", "epsilon"))
    left_out = {site: reason for reason, sites in raw["left_out"].items() for site in sites}
    receipt = Receipt(
        run=RunId(raw["run"]),
        round=raw["round"],
        attempt=raw["attempt"],
        asked=tuple(SiteId(site) for site in raw["asked"]),
        counted=tuple(Counted(*row) for row in zip(*columns, strict=True)),
        missing=raw["missing"],
        left_out=dict(sorted(left_out.items())),
        metrics=raw["metrics"],
        scores=raw["scores"],
        model=raw["model"],
        opened=raw["opened"],
        closed=raw["closed"],
        kind=raw["kind"],
        damped=raw.get("damped", {}),  # checkpoints from before have none
        stale=raw.get("stale", {}),
        carried=raw.get("carried", {}),
    )
    seen = {SiteId(site): Seen(*numbers) for site, numbers in raw["seen"].items()}
    return Entry(receipt, seen, raw["seconds"])
