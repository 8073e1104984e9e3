"""Tuning: Optuna proposes, Hydra runs, the sweep's folder remembers."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pandas as pd
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fedml.cli.optuna import search_space
from fedml.cli.simulate import simulate
from fedml.errors import ConfigError, FedmlError

TUNE = [
    "-m", "hydra/sweeper=optuna", "hydra.sweep.dir=tuned", "tracking=none", "rounds=1",
    "population.sites=2", "training.lr=tag(log, interval(0.001, 10))",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def space(*words: str) -> tuple[list[str], object]:
    return search_space(OverridesParser.create().parse_overrides(list(words)))


def test_hydra_s_grammar_describes_the_search() -> None:
    fixed, found = space(
        "rounds=3", "a=interval(0, 1)", "b=tag(log, interval(0.1, 10))", "c=range(1, 9, 2)",
        "d=choice(fedavg, fedadam)", "e=x,y", "f=tag(int, log, interval(1, 64))",
    )  # fmt: skip
    assert fixed == ["rounds=3"]
    assert found == {
        "a": FloatDistribution(0.0, 1.0),
        "b": FloatDistribution(0.1, 10.0, log=True),
        "c": IntDistribution(1, 7, step=2),
        "d": CategoricalDistribution(["fedavg", "fedadam"]),
        "e": CategoricalDistribution(["x", "y"]),
        "f": IntDistribution(1, 64, log=True),
    }


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["rounds=3"], "there is nothing to search"),
        (["a=interval(2, 1)"], "a: .*"),
        (["a=glob(*)"], "a: Optuna cannot search"),
    ],
)
def test_what_cannot_be_searched_is_one_line(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        space(*words)


def test_a_study_runs_its_trials_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate([*TUNE, "hydra.sweeper.n_trials=2"]) == 0
    assert simulate([*TUNE, "hydra.sweeper.n_trials=3"]) == 0
    assert "best accuracy" in capsys.readouterr().out
    study = optuna.load_study(study_name="simulate", storage="sqlite:///tuned/study.db")
    assert len({trial.params["training.lr"] for trial in study.trials}) == 3
    for number, trial in enumerate(study.trials):
        found = json.loads(Path(f"tuned/{number}/summary.json").read_text())
        assert trial.value == found["scores"]["accuracy"]
        assert (
            f"lr: {trial.params['training.lr']}" in Path(f"tuned/{number}/config.yaml").read_text()
        )
    best = json.loads(Path("tuned/best.json").read_text())
    assert best["accuracy"] == max(trial.value or 0.0 for trial in study.trials)
    assert (best["trials"], best["completed"]) == (3, 3)


def test_a_job_that_fails_is_a_failed_trial() -> None:
    status = simulate([*TUNE[:-2], "population.sites=2,600", "hydra.sweeper.n_trials=6"])
    table = pd.read_parquet("tuned/sweep.parquet")
    assert status == 1
    assert set(table["state"]) == {"done", "failed"}
    best = json.loads(Path("tuned/best.json").read_text())
    assert best["trials"] == 6
    assert best["completed"] == (table["state"] == "done").sum()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["hydra.sweeper.direction=up"], "hydra.sweeper.direction 'up': use 'maximize'"),
        (["hydra.sweeper.n_trials=0"], "n_trials 0"),
        (["hydra.sweeper.objective=auc", "hydra.sweeper.n_trials=1"], "there are accuracy"),
    ],
)
def test_a_study_that_cannot_be_is_one_line(words: list[str], line: str) -> None:
    with pytest.raises(FedmlError, match=line):
        simulate([*TUNE, *words])
