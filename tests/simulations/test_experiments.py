"""Each experiment is complete, composes and plays; its README is what its command reads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedml.cli.compose import configs
from fedml.cli.simulate import simulate
from fedml.errors import ConfigError
from fedml.protocol.messages import RunId, SiteId
from fedml.protocol.operations import Counted, Receipt
from fedml.simulation.results import Entry, write_table
from simulations import table
from simulations.__main__ import main
from simulations.download import Source
from simulations.figures import figure
from tests.simulations.data import FOLDER

SMALL = {
    "adult": ["training.epochs=0", "training.steps=3"],
    "mnist_1000": [
        "population.sites=10", "cohort.size=2", "training.epochs=2", "world.partial=true",
    ],
    "mnist_2nn": ["population.sites=20", "cohort.size=2", "training.epochs=0", "training.steps=2"],
    "mnist_cnn": [
        "population.sites=200", "cohort.size=1", "training.epochs=0", "training.steps=1",
        "evaluation.every=0", "evaluation.at_end=false",
    ],
    "shakespeare": ["population.least=2000", "cohort.size=2", "training.steps=2"],
    "synthetic": ["population.sites=3", "cohort.size=2", "training.epochs=2", "world.partial=true"],
    "xgboost": ["strategy.sketch=1"],
}  # fmt: skip
ROUNDS = {"xgboost": 6}  # none of its trees may be left unfinished
FILES = {
    "adult": "adult",
    "german_credit": "german_credit",
    "heart_disease": "heart_disease_uci",
    "mnist_1000": "mnist",
    "mnist_2nn": "mnist",
    "mnist_cnn": "mnist",
    "shakespeare": "tinyshakespeare",
    "xgboost": "adult",
}
EXPERIMENTS = table.experiments()


def test_all_of_them_are_there() -> None:
    assert set(EXPERIMENTS) == {
        "heart_disease", "breast_cancer", "german_credit", "adult", "mnist_2nn", "mnist_cnn",
        "mnist_1000", "synthetic", "shakespeare", "anomaly", "privacy", "robust", "xgboost",
        "fedbuff",
    }  # fmt: skip


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_complete(name: str) -> None:
    home = table.HOME / name
    assert {"recipe.py", "data.py", "README.md"} <= {path.name for path in home.iterdir()}
    assert (configs() / "experiment" / f"{name}.yaml").is_file()
    assert f"\n    python -m simulations {name}\n" in (home / "README.md").read_text()


def test_no_folder_is_left_without_a_readme() -> None:
    folders = {path.parent.name for path in table.HOME.glob("*/__init__.py")}
    assert folders == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_figure_was_measured_and_is_what_it_must_be(name: str) -> None:
    for line in table.lines(name):
        mean = float(line.measured.split()[0])
        assert line.accepts([mean]), line
        assert ("±" in line.measured) == (len(line.seeds) > 1)
        figure(name, line.figure)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_plays_a_round(name: str, tmp_path: Path) -> None:
    if name in FILES and not (FOLDER / FILES[name]).is_dir():
        pytest.skip(f"{FOLDER / FILES[name]} is not there; set FEDML_DATA")
    out = tmp_path / "out"
    rounds = ROUNDS.get(name, 1)
    overrides = [f"experiment={name}", *SMALL.get(name, []), f"rounds={rounds}"]
    assert simulate([*overrides, "tracking=none", f"hydra.run.dir={out}"]) == 0
    assert json.loads((out / "summary.json").read_text())["rounds"] == rounds


def test_overrides_go_with_an_experiment(tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = [*SMALL["synthetic"], "strategy=fedprox", "strategy.mu=0.5"]
    told = ["experiment=synthetic", "rounds=2", *overrides, "tracking=none", f"hydra.run.dir={out}"]
    assert simulate(told) == 0
    assert json.loads((out / "plan.json").read_text())["strategy"]["mu"] == 0.5


def test_a_missing_data_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from simulations.german_credit import data

    monkeypatch.setenv("FEDML_DATA", str(tmp_path))
    gone = Source("german_credit/german.data", "file:///nowhere", ("0",))
    monkeypatch.setattr(data, "SOURCE", gone)
    assert main(["german_credit", "--folder", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: german_credit/german.data is not in ")
    assert error.count("\n") == 1 and "set FEDML_DATA to a folder that has it" in error


README = """# A trial

| setting | figure | seeds | measured | must be |
|---|---|---|---|---|
| `rounds=1` | accuracy | 0-1 |  | {} |
"""


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The experiment `synthetic`, small, with a README of its own."""
    home = tmp_path / "simulations"
    (home / "synthetic").mkdir(parents=True)
    monkeypatch.setattr(table, "HOME", home)
    return home / "synthetic" / "README.md"


@pytest.mark.parametrize(
    ("must_be", "status", "verdict"),
    [("at least 0.05", 0, "| ok |"), ("at least 0.999", 1, "| NOT SO |")],
)
def test_the_command_holds_the_run_against_the_table(
    trial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    must_be: str, status: int, verdict: str,
) -> None:  # fmt: skip
    trial.write_text(README.format(must_be))
    folder = str(tmp_path / "out")
    assert main(["synthetic", *SMALL["synthetic"], "--folder", folder, "--write"]) == status
    shown = capsys.readouterr().out.splitlines()[-1]
    assert verdict in shown
    (line,) = table.lines("synthetic")
    assert "±" in line.measured and line.measured in shown
    assert line.accepts([float(line.measured.split()[0])]) == (status == 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (README.format("about 0.5"), r"line 5: 'about 0.5': write 'a to b'"),
        (README.format("0.5 to most"), r"line 5: could not convert"),
        (README.format("at least 1").replace("0-1", "all"), r"line 5: invalid literal"),
        ("# Nothing\n", "no table under the header"),
        (README.format("at least 1").replace("accuracy", "beauty!"), "no figure 'beauty!'"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(
    trial: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    trial.write_text(text)
    assert main(["synthetic"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_an_unknown_experiment_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cifar"]) == 1
    assert "no experiment 'cifar'; there are adult" in capsys.readouterr().err
    assert main([]) == 0
    assert capsys.readouterr().out.split() == list(EXPERIMENTS)


def test_figures_are_read_off_the_curve(tmp_path: Path) -> None:
    bern = SiteId("bern")
    scored = [
        Entry(Receipt(RunId("r"), n, 1, (bern,), (Counted(bern, 1.0, "", 0.0),), kind="evaluate",
                      scores={"accuracy": value}))
        for n, value in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.8))
    ]  # fmt: skip
    write_table(tmp_path / "results.parquet", scored)
    assert figure("adult", "rounds to accuracy 0.7")(tmp_path) == 2
    assert figure("adult", "rounds to accuracy 0.95")(tmp_path) == float("inf")
    late = figure("adult", "accuracy, mean of the last 2 scorings")(tmp_path)
    assert late == pytest.approx(0.75)
    with pytest.raises(ConfigError, match="no score 'auc' was kept"):
        figure("adult", "auc, mean of the last 2 scorings")(tmp_path)
