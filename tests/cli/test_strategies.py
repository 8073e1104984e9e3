"""`fedml strategies` lists what there is with where it is from, and says what goes with what."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedml.cli.strategies import tell
from fedml.strategies import STRATEGIES
from tests.installed.packages import register
from tests.system.page import ROOT

BLIND = """
from dataclasses import dataclass
from fedml.strategies import QFedAvg

@dataclass(frozen=True)
class Blind(QFedAvg):
    depth: int = 1
"""


def listed(capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, str], dict[str, str]]:
    tell("", show_modes=False, as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {(row["kind"], row["name"]): row for row in rows}


def test_all_is_listed_with_its_origin_and_what_is_wrong_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "blindly.py").write_text(BLIND)
    offered = {"blind": "blindly:Blind", "gone": "nowhere:Gone", "fedavg": "blindly:Blind"}
    register(tmp_path, "others", {"fedml.strategies": offered, "fedml.recipes": {"eyes": "a:B"}})
    rows = listed(capsys)
    assert {name for kind, name in rows if kind == "strategy"} >= STRATEGIES.ours.keys()
    ours = rows["strategy", "fedadam"]
    assert (ours["origin"], ours["problem"]) == ("fedml", "")
    theirs = rows["strategy", "blind"]
    assert (theirs["origin"], theirs["problem"]) == ("others 1.0", "")
    assert "there is no module nowhere" in rows["strategy", "gone"]["problem"]
    assert "has the name of one of ours" in rows["strategy", "fedavg"]["problem"]
    assert rows["recipe", "eyes"]["origin"] == "others 1.0"
    assert rows["recipe", "breast_cancer"]["origin"] == "fedml"


def test_the_table_of_modes_is_the_page_s(capsys: pytest.CaptureFixture[str]) -> None:
    tell("", show_modes=True, as_json=False)
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "algorithms.md").read_text()


def test_a_strategy_in_a_file_is_judged_as_the_plan_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "blind.py").write_text(BLIND)
    tell(f"{tmp_path}/blind.py:Blind", show_modes=False, as_json=False)
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["none"] == "yes"
    assert lines["record"].startswith("no: strategy Blind with record privacy: its sites report")
    assert lines["secagg"].startswith("no: secagg with strategy Blind")
    assert lines["vectorised"].startswith("one by one: rule qfedavg is not elementwise")
