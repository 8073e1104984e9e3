"""What a simulation leaves behind: one tidy table, one summary, one model.

results.csv   one line per round and site: asked or not, counted or not, and why
summary.json  how the run ended, its scores, each site's epsilon, the model's digest
plan.json     the plan, as an operator would submit it
model.safetensors
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedml import durable
from fedml.params import encode
from fedml.protocol.operations import Receipt
from fedml.rounds import Plan
from fedml.simulation.engine import Outcome

COLUMNS = (
    "round", "attempt", "kind", "site", "outcome", "reason", "weight", "epsilon", "digest", "model",
)  # fmt: skip


def lines(receipts: Sequence[Receipt]) -> Iterator[dict[str, object]]:
    """Yield one line per round and site; metrics and scores are the round's, on each line."""
    for receipt in receipts:
        shared: dict[str, object] = {
            "round": receipt.round,
            "attempt": receipt.attempt,
            "kind": receipt.kind,
            "model": receipt.model,
            **{f"metric.{name}": value for name, value in receipt.metrics.items()},
            **{f"score.{name}": value for name, value in receipt.scores.items()},
        }
        for one in receipt.counted:
            told = {"weight": one.weight, "epsilon": one.epsilon, "digest": one.digest}
            yield {**shared, "site": one.site, "outcome": "counted", **told}
        for outcome, reasons in (("missing", receipt.missing), ("left out", receipt.left_out)):
            for site, reason in reasons.items():
                yield {**shared, "site": site, "outcome": outcome, "reason": reason}


def epsilon(receipts: Sequence[Receipt], kind: str = "train") -> dict[str, float]:
    """Return what each site's rows have spent by the last receipt that counts it."""
    ours = (receipt for receipt in receipts if receipt.kind == kind)
    return {one.site: one.epsilon for receipt in ours for one in receipt.counted}


def summarise(plan: Plan, outcome: Outcome) -> dict[str, object]:
    """Return the run in one JSON object."""
    candidate = outcome.candidate
    scored = [receipt.scores for receipt in outcome.receipts if receipt.scores]
    return {
        "state": outcome.end.state,
        "detail": outcome.end.detail,
        "rounds": sum(1 for r in outcome.receipts if r.kind == "train" and r.model),
        "scores": dict(scored[-1]) if scored else {},
        "epsilon": epsilon(outcome.receipts),
        "evaluation_epsilon": epsilon(outcome.receipts, "evaluate"),
        "model": candidate.params.digest() if candidate else "",
        "plan": plan.digest(),
        "virtual_seconds": outcome.seconds,
    }


def write(folder: Path, plan: Plan, outcome: Outcome) -> dict[str, object]:
    """Write all files into `folder`, and return the summary."""
    rows = list(lines(outcome.receipts))
    extra = sorted({name for row in rows for name in row} - set(COLUMNS))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, [*COLUMNS, *extra], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    durable.replace(folder / "results.csv", text.getvalue().encode())
    durable.replace(folder / "plan.json", plan.to_json().encode() + b"\n")
    if outcome.candidate:
        pieces = encode({"": outcome.candidate.params})
        durable.replace(folder / "model.safetensors", b"".join(pieces))
    summary = summarise(plan, outcome)
    durable.replace(folder / "summary.json", durable.dump_json(summary) + b"\n")
    return summary
