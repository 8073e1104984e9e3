"""What a multirun leaves behind: one row per job, and the privacy-utility curve.

sweep.parquet         one row per job: its overrides, how it ended, scores, epsilon, seconds
sweep.json            the same, for people
privacy-utility.png   score against epsilon, if the jobs had several
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from fedml import durable
from fedml.rounds import Plan
from fedml.simulation.plots import draw_trade
from fedml.strategies import describe

_INFINITE = float("inf")


@dataclass(frozen=True)
class Job:
    """One job of a multirun: what was overridden for it, and what came of it.

    Either `summary` is there, with the plan that it came of, or `error` says why not.
    """

    number: int
    folder: Path
    overrides: Mapping[str, str]
    plan: Plan | None = None
    summary: Mapping[str, object] = field(default_factory=dict)
    error: str = ""


Row = dict[str, object]


def row(job: Job) -> Row:
    """Return a job in one row; `epsilon` is what its sites may spend at most, None for no limit."""
    summary, plan = job.summary, job.plan
    scores = cast(Mapping[str, float], summary.get("scores") or {})
    private = plan is not None and plan.privacy.mode != "none"
    return {
        "job": job.number,
        "folder": str(job.folder),
        **{f"override.{key}": value for key, value in job.overrides.items()},
        "state": summary.get("state", "failed"),
        "error": job.error,
        "strategy": describe(plan.strategy)["name"] if plan else None,
        "seed": plan.seed if plan else None,
        "epsilon": plan.privacy.epsilon if plan and private else None,
        "spent": max(cast(Mapping[str, float], summary.get("epsilon") or {}).values(), default=0.0),
        "rounds": summary.get("rounds"),
        "seconds": summary.get("seconds"),
        **{f"score.{name}": value for name, value in scores.items()},
    }


def write(folder: Path, jobs: Sequence[Job]) -> list[Path]:
    """Write the table, and the curve if there is one to draw, into `folder`; return the files."""
    found = [row(job) for job in sorted(jobs, key=lambda job: job.number)]
    names = list(dict.fromkeys(name for one in found for name in one))
    whole = [{name: one.get(name) for name in names} for one in found]
    files = [folder / "sweep.parquet", folder / "sweep.json"]
    with pa.BufferOutputStream() as stream:
        pq.write_table(pa.Table.from_pylist(whole), stream)
        durable.replace(files[0], stream.getvalue().to_pybytes())
    durable.replace(files[1], durable.dump_json(whole) + b"\n")
    return [*files, *_trade(folder / "privacy-utility.png", whole)]


def _trade(path: Path, found: Sequence[Row]) -> list[Path]:
    """Draw the first score, by name, against epsilon."""
    done = [one for one in found if one["state"] == "done"]
    varied = _varied(done)
    score = min((n for one in done for n in one if n.startswith("score.")), default="")
    private: dict[str, dict[float, list[float]]] = {}
    public: dict[str, dict[float, list[float]]] = {}
    for one in done:
        value = one.get(score)
        if not isinstance(value, float):
            continue
        line = " ".join([str(one["strategy"]), *(f"{k[9:]}={one[k]}" for k in varied if one[k])])
        at = one["epsilon"]
        if isinstance(at, float):
            private.setdefault(line, {}).setdefault(at, []).append(value)
        else:
            public.setdefault(line, {}).setdefault(_INFINITE, []).append(value)
    if len({epsilon for points in private.values() for epsilon in points}) < 2:
        return []
    name = score.removeprefix("score.")
    title = f"Privacy and utility: {name} after {done[0]['rounds']} rounds"
    return [draw_trade(path, title, name, private, public)]


def _varied(found: Sequence[Row]) -> list[str]:
    """Return the overrides that tell one line from another, beside strategy, epsilon and seed."""
    axes = {"override.strategy", "override.privacy", "override.privacy.epsilon", "override.seed"}
    names = {name for one in found for name in one if name.startswith("override.")} - axes
    return sorted(name for name in names if len({one.get(name) for one in found}) > 1)
