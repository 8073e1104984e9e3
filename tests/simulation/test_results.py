"""A simulation leaves a tidy table, a summary and the model."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from fedml.params import decode
from fedml.protocol.messages import Privacy, RunId, SiteId
from fedml.protocol.operations import Counted, Receipt
from fedml.rounds import Plan
from fedml.simulation import results
from fedml.simulation.results import Entry
from fedml.simulation.witness import Seen, Witness
from tests.simulation.worlds import Late, chronicle, engine, plan, play

SLOW = "site-3"


def entries(a_plan: Plan, *, slow: bool = False) -> list[Entry]:
    kept, told = chronicle(a_plan)
    if slow:
        kept.world = Late(lambda task: 61.0 if task.site == SLOW else 0.0)
    kept.play()
    return told.entries


def table(folder: Path, found: list[Entry]) -> pd.DataFrame:
    results.write_table(folder / "results.parquet", found)
    return pd.read_parquet(folder / "results.parquet")


def test_the_table_has_a_row_for_each_round_and_site_and_one_for_the_round(tmp_path: Path) -> None:
    rows = table(tmp_path, entries(plan(rounds=2), slow=True))
    assert len(rows) == len(rows[["kind", "round", "site"]].drop_duplicates()) == 3 * 5
    late = rows[rows["site"] == SLOW]
    assert {*zip(late["outcome"], late["reason"], strict=True)} == {
        ("missing", "no answer within 60 s")
    }
    trained = rows[(rows["kind"] == "train") & (rows["outcome"] == "counted")]
    assert (trained["weight"] > 100).all()
    assert trained["metric.loss"].nunique() == len(trained)  # each site's own
    assert (trained["bytes_up"] == trained["bytes_down"]).all()
    assert (trained["bytes_up"] == 31 * 8).all() or (trained["bytes_up"] > 0).all()
    assert (trained["seconds"] > 0).all()
    assert (rows["virtual_seconds"] == 60.0).all()


def test_a_round_s_own_row_is_the_weighted_mean_of_its_sites(tmp_path: Path) -> None:
    rows = table(tmp_path, entries(plan(rounds=1)))
    for kind, name in (("train", "metric.loss"), ("evaluate", "score.accuracy")):
        sites = rows[(rows["kind"] == kind) & (rows["outcome"] == "counted")]
        total = rows[(rows["kind"] == kind) & (rows["outcome"] == "total")].iloc[0]
        mean = (sites[name] * sites["weight"]).sum() / sites["weight"].sum()
        assert abs(total[name] - mean) < 1e-9
        assert total["weight"] == sites["weight"].sum()
        assert total["bytes_down"] == sites["bytes_down"].sum()


def test_what_sites_have_spent_is_there(tmp_path: Path) -> None:
    privacy = Privacy("record", epsilon=5.0, delta=1e-5, rounds=2, evaluation_epsilon=1.0)
    rows = table(tmp_path, entries(plan(rounds=2, privacy=privacy)))
    spent = rows[(rows["kind"] == "train") & (rows["outcome"] == "counted")].groupby("site")
    assert all(0 < first < last <= 5.0 for first, last in spent["epsilon"].apply(tuple))


def test_a_million_sites_that_were_not_drawn_are_a_number(tmp_path: Path) -> None:
    receipt = Receipt(
        RunId("simulation"), 1, 1, (SiteId("a"),), (Counted(SiteId("a"), 1.0, "", 0.0),),
        left_out={f"site-{number}": "not drawn" for number in range(100_000)},
    )  # fmt: skip
    rows = table(tmp_path, [Entry(receipt, {SiteId("a"): Seen({"loss": 0.5})}, 1.0)])
    assert len(rows) == 2
    assert rows["left_out"].tolist()[1:] == [100_000]
    assert (tmp_path / "results.parquet").stat().st_size < 20_000


def test_the_summary_tells_how_it_ended(tmp_path: Path) -> None:
    kept, told = chronicle(plan())
    outcome = kept.play()
    summary = results.write(tmp_path, plan(), told.entries, outcome)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert (summary["state"], summary["rounds"]) == ("done", 3)
    scores = summary["scores"]
    assert isinstance(scores, dict)
    assert scores["accuracy"] > 0.8
    assert summary["outcomes"] == {"counted": 16, "missing": 0}


def test_a_run_that_was_interrupted_leaves_what_it_has(tmp_path: Path) -> None:
    kept, told = chronicle(plan())
    kept.play()
    summary = results.write(tmp_path, plan(), told.entries[:2], None)
    assert (summary["state"], summary["rounds"], summary["model"]) == ("interrupted", 2, "")
    assert len(pd.read_parquet(tmp_path / "results.parquet")) == 10
    assert not (tmp_path / "model.safetensors").exists()


def test_the_model_and_the_plan_can_be_read_back(tmp_path: Path) -> None:
    summary = results.write(tmp_path, plan(), [], play(plan()))
    params = decode((tmp_path / "model.safetensors").read_bytes())[""]
    assert params.digest() == summary["model"]
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == plan()


def test_a_witness_changes_nothing() -> None:
    watched = engine(plan())
    watched.executor = Witness(watched.executor)
    assert watched.play().receipts == play(plan()).receipts
