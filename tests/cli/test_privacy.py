"""`fedml privacy`: figures before a run, and a ledger that its owner can read, check and take."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedml import durable
from fedml.cli.main import app
from fedml.errors import Corrupt, FedmlError
from fedml.privacy import chain
from fedml.privacy.accounting import Pure, SampledGaussian
from fedml.privacy.ledger import Ledger, Limits
from fedml.protocol.messages import RunId, TaskId, Trained
from fedml.site.memory import Memory
from tests.site.wire import ORDER, UPDATED, worked

POLICY = """
[recipes.breast_cancer]
digest = "{digest}"
[datasets.records]
train = "train.csv"
rows = 100
recipes = ["breast_cancer"]
epsilon = 3.0
"""
PLAN = ["privacy", "plan", "--rows", "500", "--epsilon", "3", "--rounds", "20", "--steps", "10"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "policy.toml").write_text(POLICY.format(digest=ORDER.recipe.digest))
    return tmp_path


def spend(site: Path, *tasks: str) -> None:
    book = Ledger(site / "ledger" / "records.jsonl", name="records", limits=Limits(3.0, 1e-5))
    for task in tasks:
        event = SampledGaussian(0.5, 10.0, 5)
        book.reserve(
            TaskId(task), RunId("run-1"), "train", event, planned=9, recipe="breast_cancer"
        )
        book.charge(TaskId(task))
    book.reserve(TaskId("score"), RunId("run-2"), "held-out", Pure(0.25))
    book.close()


def test_a_plan_s_noise_and_cost_both_ways(tmp_path: Path) -> None:
    drawn = tmp_path / "cost.png"
    said = run(*PLAN, "--batch", "50", "--plot", str(drawn))
    assert said.exit_code == 0
    assert "sampling 0.1, 200 steps in 20 rounds" in said.output
    assert "epsilon 2.99" in said.output and "add/remove one row" in said.output
    assert drawn.read_bytes().startswith(b"\x89PNG")
    figures = json.loads(run(*PLAN, "--batch", "50", "--json").output)
    assert figures["epsilon"] <= 3.0 < figures["filtered"]


def test_a_plan_that_no_noise_gives_is_one_line() -> None:
    said = run(
        "privacy", "plan", "--rows", "9", "--epsilon", "1e9", "--rounds", "1", "--steps", "1"
    )
    assert isinstance(said.exception, FedmlError)
    assert "is no privacy; ask for at most" in str(said.exception)


def test_a_ledger_is_shown_with_its_adjacency(site: Path) -> None:
    assert "records: epsilon 0.000 of 3 spent" in run("privacy", "ledger", "show", str(site)).output
    spend(site, "a", "b")
    shown = run("privacy", "ledger", "show", str(site)).output
    assert "of 3 spent at delta 1e-05, add/remove one record; 2 charged, 1 reserved" in shown
    assert "run run-1: " in shown
    found = json.loads(run("privacy", "ledger", "show", str(site), "--json").output)
    assert found["spent"] == found["runs"]["run-1"] > 0
    assert found["filtered"] >= found["spent"]


def test_a_ledger_is_exported_whole(site: Path) -> None:
    spend(site, "a", "b")
    lines = run("privacy", "ledger", "export", str(site)).output.splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["a", "b", "score"]
    table = list(
        csv.DictReader(
            io.StringIO(run("privacy", "ledger", "export", str(site), "--as", "csv").output)
        )
    )
    assert [(row["task"], row["state"], row["noise"], row["epsilon"]) for row in table] == [
        ("a", "charged", "10.0", ""),
        ("b", "charged", "10.0", ""),
        ("score", "reserved", "", "0.25"),
    ]  # fmt: skip
    assert {row["adjacency"] for row in table} == {"add/remove one"}


def test_a_whole_ledger_is_verified(site: Path) -> None:
    spend(site, "a", "b")
    said = run("privacy", "ledger", "verify", str(site))
    assert said.exit_code == 0
    assert said.output == "records, by record: whole, 3 tasks that count\n"


@pytest.mark.parametrize("what", ["rewritten", "truncated", "no guard"])
def test_a_damaged_ledger_fails_in_one_line(site: Path, what: str) -> None:
    spend(site, "a", "b")
    path = site / "ledger" / "records.jsonl"
    if what == "rewritten":
        path.write_bytes(path.read_bytes().replace(b'"noise":10.0', b'"noise":99.0', 1))
    elif what == "truncated":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    else:
        chain.head_of(path).unlink()
    said = run("privacy", "ledger", "verify", str(site))
    assert said.exit_code != 0
    assert isinstance(said.exception, Corrupt)
    assert str(path) in str(said.exception) and "\n" not in str(said.exception)


def test_an_answer_that_no_charge_covers_is_found(site: Path) -> None:
    worked(site)
    Memory(site).finish(Trained(ORDER.task, UPDATED, 100.0, epsilon=1.0))
    spend(site, "a")
    said = run("privacy", "ledger", "verify", str(site))
    assert f"task {ORDER.task} was answered, and no charge is there" in str(said.exception)
    spend(site, ORDER.task)
    assert run("privacy", "ledger", "verify", str(site)).exit_code == 0
    assert durable.read_log(site / "ledger" / "records.jsonl")
