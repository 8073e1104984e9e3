"""What a simulation leaves behind, in one folder.

config.yaml          the settings, resolved
plan.json            the plan, as an operator would submit it
results.parquet      a tidy table: one row per round and site, and one for each round's total
summary.json         how the run ended, its scores, each site's epsilon, the model's digest
model.safetensors    the final parameters
score.png loss.png epsilon.png
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fedml import durable
from fedml.params import encode
from fedml.protocol.messages import SiteId
from fedml.protocol.operations import Receipt
from fedml.rounds import Plan
from fedml.simulation.engine import Outcome
from fedml.simulation.witness import Seen

RESULTS, SUMMARY, MODEL = "results.parquet", "summary.json", "model.safetensors"
_NAMES = pa.dictionary(pa.int32(), pa.string())
_FIXED = {
    "run": _NAMES, "round": pa.int32(), "attempt": pa.int32(), "kind": _NAMES, "site": pa.string(),
    "outcome": _NAMES, "reason": _NAMES, "weight": pa.float64(), "epsilon": pa.float64(),
    "bytes_down": pa.int64(), "bytes_up": pa.int64(), "seconds": pa.float64(),
    "virtual_seconds": pa.float64(), "left_out": pa.int64(), "model": pa.string(),
}  # fmt: skip
_BATCH = 50_000  # rows written at once
Row = dict[str, object]


@dataclass(frozen=True)
class Entry:
    """One committed round or evaluation: its receipt, what was seen of its sites, and for how long.

    `seconds` are those that this machine took.
    """

    receipt: Receipt
    seen: Mapping[SiteId, Seen] = field(default_factory=dict)
    seconds: float = 0.0


def rows(entry: Entry) -> Iterator[Row]:
    """Yield a row for each site that was asked, and then the round's own, whose `site` is None.

    `outcome` is "counted", "missing" or "total"; who counted for little has a `reason` as the
    missing have. `metric.*` and `score.*` are what the site's rows gave, on the total's row what
    they come to together. Sites that were not asked are a number
    there, `left_out`. `seconds` passed on this machine, `virtual_seconds` in the simulated world.
    """
    receipt = entry.receipt
    shared: Row = {
        "run": receipt.run,
        "round": receipt.round,
        "attempt": receipt.attempt,
        "kind": receipt.kind,
        "virtual_seconds": receipt.closed - receipt.opened,
    }
    for one in receipt.counted:
        told: Row = {"weight": one.weight, "epsilon": one.epsilon}
        own = _own(entry.seen.get(one.site))
        if one.site in receipt.damped:
            told["reason"] = receipt.damped[one.site]
        yield {**shared, "site": one.site, "outcome": "counted", **told, **own}
    for site, reason in receipt.missing.items():
        own = _own(entry.seen.get(SiteId(site)))
        yield {**shared, "site": site, "outcome": "missing", "reason": reason, **own}
    yield {
        **shared,
        "outcome": "total",
        "weight": math.fsum(one.weight for one in receipt.counted),
        "epsilon": max((one.epsilon for one in receipt.counted), default=None),
        "bytes_down": sum(seen.down for seen in entry.seen.values()),
        "bytes_up": sum(seen.up for seen in entry.seen.values()),
        "seconds": entry.seconds,
        "left_out": len(receipt.left_out),
        "model": receipt.model,
        **_named(receipt.metrics, receipt.scores),
    }


def _own(seen: Seen | None) -> Row:
    if seen is None:
        return {}
    sizes = {"bytes_down": seen.down, "bytes_up": seen.up, "seconds": seen.seconds}
    return {**sizes, **_named(seen.metrics, seen.scores)}


def _named(metrics: Mapping[str, float], scores: Mapping[str, float]) -> Row:
    return {
        **{f"metric.{name}": value for name, value in metrics.items()},
        **{f"score.{name}": value for name, value in scores.items()},
    }


def epsilon(entries: Sequence[Entry], kind: str = "train") -> dict[str, float]:
    """Return what each site's rows have spent by the last receipt that counts it."""
    ours = (entry.receipt for entry in entries if entry.receipt.kind == kind)
    return {one.site: one.epsilon for receipt in ours for one in receipt.counted}


def summarise(plan: Plan, entries: Sequence[Entry], outcome: Outcome | None) -> dict[str, object]:
    """Return the run in one JSON object; without an outcome it was interrupted.

    What sites have spent is a list by site, or with thousands of them its largest alone.
    """
    candidate = outcome.candidate if outcome else None
    scored = [entry.receipt.scores for entry in entries if entry.receipt.scores]
    trained = [entry for entry in entries if entry.receipt.kind == "train" and entry.receipt.model]
    spent, scoring = epsilon(entries), epsilon(entries, "evaluate")
    return {
        "state": outcome.end.state if outcome else "interrupted",
        "detail": outcome.end.detail if outcome else f"{len(trained)} rounds are committed",
        "rounds": len(trained),
        "scores": dict(scored[-1]) if scored else {},
        "metrics": dict(trained[-1].receipt.metrics) if trained else {},
        "epsilon": _most(spent),
        "evaluation_epsilon": _most(scoring),
        "model": candidate.params.digest() if candidate else "",
        "plan": plan.digest(),
        "seconds": math.fsum(entry.seconds for entry in entries),
        "virtual_seconds": entries[-1].receipt.closed if entries else 0.0,
        "outcomes": _outcomes(entries),
    }


def _most(spent: Mapping[str, float]) -> dict[str, float]:
    few = len(spent) <= 1000
    return dict(spent) if few else {"largest": max(spent.values())}


def _outcomes(entries: Sequence[Entry]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for entry in entries:
        found["counted"] += len(entry.receipt.counted)
        found["missing"] += len(entry.receipt.missing)
    return dict(found)


def write(
    folder: Path, plan: Plan, entries: Sequence[Entry], outcome: Outcome | None
) -> dict[str, object]:
    """Write table, summary, plan and model into `folder`, and return the summary."""
    write_table(folder / RESULTS, entries)
    durable.replace(folder / "plan.json", plan.to_json().encode() + b"\n")
    if outcome and outcome.candidate:
        pieces = encode({"": outcome.candidate.params})
        durable.replace(folder / MODEL, *pieces)
    summary = summarise(plan, entries, outcome)
    durable.replace(folder / SUMMARY, durable.dump_json(summary) + b"\n")
    return summary


def write_table(path: Path, entries: Sequence[Entry]) -> None:
    """Write all rows to a parquet file, some at a time; the old file stays until it is whole."""
    durable.make_folder(path.parent)
    schema = _schema(entries)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with pq.ParquetWriter(draft, schema) as file:
            waiting: list[Row] = []
            for entry in entries:
                waiting.extend(rows(entry))
                if len(waiting) >= _BATCH:
                    file.write_table(pa.Table.from_pylist(waiting, schema))
                    waiting = []
            file.write_table(pa.Table.from_pylist(waiting, schema))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _schema(entries: Sequence[Entry]) -> pa.Schema:
    names: set[str] = set()
    for entry in entries:
        names.update(_named(entry.receipt.metrics, entry.receipt.scores))
        for seen in entry.seen.values():
            names.update(f"metric.{name}" for name in seen.metrics)
            names.update(f"score.{name}" for name in seen.scores)
    return pa.schema([*_FIXED.items(), *((name, pa.float64()) for name in sorted(names))])
