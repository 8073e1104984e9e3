"""A simulation leaves a tidy table, a summary and the model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from fedml.params import decode
from fedml.rounds import Plan
from fedml.simulation import results
from tests.simulation.worlds import Late, engine, plan, play

SLOW = "site-3"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_a_line_for_each_round_and_site(tmp_path: Path) -> None:
    slow = engine(plan(rounds=2))
    slow.world = Late(lambda task: 61.0 if task.site == SLOW else 0.0)
    results.write(tmp_path, plan(rounds=2), slow.play())
    rows = table(tmp_path)
    assert len({(row["kind"], row["round"], row["site"]) for row in rows}) == len(rows) == 12
    late = [row for row in rows if row["site"] == SLOW]
    assert {(row["outcome"], row["reason"]) for row in late} == {
        ("missing", "no answer within 60 s")
    }
    counted = [row for row in rows if row["outcome"] == "counted" and row["kind"] == "train"]
    assert all(float(row["weight"]) > 100 for row in counted)
    assert all(float(row["metric.loss"]) > 0 for row in counted)


def test_the_summary_tells_how_it_ended(tmp_path: Path) -> None:
    outcome = play(plan())
    summary = results.write(tmp_path, plan(), outcome)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["state"] == "done"
    assert summary["rounds"] == 3
    scores = summary["scores"]
    assert isinstance(scores, dict)
    assert scores["accuracy"] > 0.8


def test_the_model_and_the_plan_can_be_read_back(tmp_path: Path) -> None:
    outcome = play(plan())
    summary = results.write(tmp_path, plan(), outcome)
    params = decode((tmp_path / "model.safetensors").read_bytes())[""]
    assert params.digest() == summary["model"]
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == plan()
