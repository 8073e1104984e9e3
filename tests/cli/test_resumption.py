"""The program itself, killed and interrupted, goes on by its folder; and only as it began."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import fedml
from fedml.cli.simulate import simulate
from fedml.errors import FedmlError

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(fedml.__file__).parents[1])}
SETTINGS = ["tracking=none", "evaluation.every=5", "training.steps=2", "strategy=fedadam"]
SLOWLY = [*SETTINGS, "rounds=15", "training.steps=40", "population.sites=2"]  # to be stopped


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def outcome(folder: str) -> dict[str, Any]:
    found = json.loads(Path(folder, "summary.json").read_text())
    return {name: value for name, value in found.items() if name != "seconds"}


def table(folder: str) -> pd.DataFrame:
    """Return a simulation's rows without what a clock decides."""
    return pd.read_parquet(Path(folder, "results.parquet")).drop(columns=["seconds"])


def stop(number: int, checkpoint: float) -> tuple[int, str]:
    """Start a simulation in `out`, send it a signal behind round 3; return what it said."""
    settings = [*SLOWLY, "hydra.run.dir=out", f"checkpoint={checkpoint}"]
    command = [sys.executable, "-u", "-m", "fedml.simulate", *settings]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdout is not None
        told = ""
        for line in process.stdout:
            told += line
            if line.startswith("round 3:"):
                process.send_signal(number)
                break
        told += process.stdout.read()
    return process.returncode, told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert simulate([*SLOWLY, f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize(
    ("number", "checkpoint", "status"),
    [
        (signal.SIGKILL, 0.0, -9),
        (signal.SIGINT, 3600.0, 130),
        (signal.SIGTERM, 3600.0, 143),
    ],
)
def test_a_program_that_is_stopped_goes_on_to_the_same_bytes(
    number: int, checkpoint: float, status: int, whole: Path
) -> None:
    returned, told = stop(number, checkpoint)
    assert returned == status, told
    if number != signal.SIGKILL:
        assert "go on with: fedml simulate resume=" in told
        assert (outcome("out")["state"], outcome("out")["model"]) == ("interrupted", "")
        assert 3 <= outcome("out")["rounds"] < 15
        assert len(table("out")) >= 3 * 3
    assert simulate(["resume=out"]) == 0
    assert outcome("out") == outcome(str(whole))
    pd.testing.assert_frame_equal(table("out"), table(str(whole)))
    model = Path("out", "model.safetensors").read_bytes()
    assert model == (whole / "model.safetensors").read_bytes()
    assert "resume" not in Path("out/.hydra/overrides.yaml").read_text()


def test_a_simulation_that_was_done_says_so_again(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate([*SETTINGS, "rounds=3", "hydra.run.dir=out"]) == 0
    before = table("out")
    capsys.readouterr()
    assert simulate(["resume=out"]) == 0
    told = capsys.readouterr().out
    assert "going on after round 3 of 3" in told
    assert "round 1" not in told
    pd.testing.assert_frame_equal(table("out"), before)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["resume=out", "rounds=5"], "out cannot go on: rounds was 3 and is 5"),
        (
            ["resume=out", "strategy=fedavg"],
            "strategy._target_ was fedml.strategies.fedopt.FedAdam",
        ),
        (["resume=true", "hydra.run.dir=out", "rounds=3"], "strategy._target_ was"),
        (["-m", "resume=out"], "with -m use resume=true"),
        (["resume=."], "resume=.: no config.yaml there"),
    ],
)
def test_it_goes_on_with_its_own_settings_only(overrides: list[str], line: str) -> None:
    assert simulate([*SETTINGS, "rounds=3", "hydra.run.dir=out"]) == 0
    before = Path("out/summary.json").read_bytes()
    with pytest.raises(FedmlError) as caught:
        simulate([*overrides, "tracking=none"])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert Path("out/summary.json").read_bytes() == before
    assert simulate([*SETTINGS, "rounds=3", "resume=out"]) == 0  # what agrees may be said


def test_a_recipe_that_changed_meanwhile_is_named(tmp_path: Path) -> None:
    source = Path(fedml.__file__).parent / "recipes" / "breast_cancer.py"
    own = tmp_path / "mine.py"
    own.write_text(source.read_text())
    mine = ["recipes={mine: mine.py:BreastCancer}", "recipe.name=mine"]
    assert simulate([*SETTINGS, *mine, "rounds=2", "hydra.run.dir=out"]) == 0
    own.write_text(source.read_text() + "\n")
    with pytest.raises(FedmlError, match=r"out cannot go on: recipe.digest was"):
        simulate(["resume=out"])


def test_the_same_folder_without_resume_begins_anew(capsys: pytest.CaptureFixture[str]) -> None:
    for rounds in (3, 2):
        assert simulate([*SETTINGS, f"rounds={rounds}", "hydra.run.dir=out"]) == 0
        assert outcome("out")["rounds"] == rounds


def test_a_multirun_goes_on_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = ["-m", "seed=0,1", "rounds=2", "hydra.sweep.dir=many", *SETTINGS]
    assert simulate(jobs) == 0
    before = [outcome(f"many/{number}") for number in (0, 1)]
    Path("many/1/summary.json").unlink()
    capsys.readouterr()
    assert simulate([*jobs, "resume=true"]) == 0
    assert capsys.readouterr().out.count("going on after round 2 of 2") == 2
    assert [outcome(f"many/{number}") for number in (0, 1)] == before


def test_one_folder_is_for_one_program() -> None:
    assert simulate([*SETTINGS, "rounds=2", "hydra.run.dir=out"]) == 0
    from fedml import durable

    with (
        durable.lock(Path("out/checkpoint"), "another"),
        pytest.raises(FedmlError, match="is in use by another"),
    ):
        simulate(["resume=out"])
