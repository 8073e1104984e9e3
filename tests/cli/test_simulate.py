"""`fedml simulate` is a Hydra program: its command line, its folder, its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import fedml.recipes.breast_cancer
from fedml.cli.compose import configs
from fedml.cli.simulate import simulate
from fedml.errors import ConfigError, FedmlError
from fedml.params import read
from fedml.simulation.population import ShippedData

QUICK = ["tracking=none", "hydra.run.dir=out"]
STAGED = sorted(
    f"{path.parent.name}={path.stem}"
    for group in ("population", "world", "attackers")
    for path in (configs() / group).glob("*.yaml")
)
NEEDED = {
    "population=files": ["population.files={bern: bern.csv}"],
    "population=column": ["population.column=target"],
    "population=crowd": ["cohort.size=5"],
    "population=shards": ["population.drop_rest=true"],
    "population=own": [
        "population._target_=fedml.simulation.population.IID",
        "+population.sites=3",
    ],
}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(fedml.__file__).parents[1])}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDML_DATA", str(tmp_path))


def summary(folder: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "summary.json").read_text())
    return found


def settled(found: Mapping[str, object]) -> dict[str, object]:
    """Leave out what a clock decides."""
    return {name: value for name, value in found.items() if name != "seconds"}


def run_simulation(*overrides: str) -> dict[str, Any]:
    assert simulate([*QUICK, "rounds=3", *overrides]) == 0
    return summary()


def program(*argv: str, entry: str = "fedml.simulate") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", entry, *argv]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=280)


@pytest.mark.parametrize("choice", STAGED)
def test_every_population_world_and_attack_plays_a_round(choice: str, tmp_path: Path) -> None:
    if choice == "population=files":
        with ShippedData("breast_cancer").file() as path:
            (tmp_path / "bern.csv").write_bytes(path.read_bytes())
    found = run_simulation("rounds=1", choice, *NEEDED.get(choice, []))
    assert (found["state"], found["rounds"]) == ("done", 1)


@pytest.mark.parametrize("privacy", [[], ["privacy=record", "privacy.epsilon=8"]])
def test_a_simulation_runs_end_to_end(privacy: list[str]) -> None:
    found = run_simulation("strategy=fedprox", "strategy.mu=0.1", "seed=3", *privacy)
    assert (found["state"], found["rounds"]) == ("done", 3)
    assert len(found["epsilon"]) == 5
    assert all((7 < e <= 8) if privacy else e == 0 for e in found["epsilon"].values())
    files = {path.name for path in Path("out").iterdir()}
    wanted = {"config.yaml", "plan.json", "results.parquet", "summary.json", "model.safetensors"}
    assert files >= {*wanted, "score.png", "epsilon.png" if privacy else "loss.png"}
    assert not any(name.endswith(".csv") for name in files)
    assert "rounds: 3" in Path("out", "config.yaml").read_text()
    assert "${" not in Path("out", "config.yaml").read_text()
    table = pd.read_parquet("out/results.parquet")
    assert (
        table.groupby("kind", observed=True).size() == pd.Series({"train": 18, "evaluate": 6})
    ).all()


def test_a_simulation_says_that_it_is_the_party_that_sites_who_share_noise_trust(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shared = ["privacy=record_distributed", "privacy.epsilon=3", "training.steps=1"]
    found = run_simulation(*shared, "cohort.quorum=5", "privacy.evaluation_epsilon=100")
    assert found["state"] == "done" and found["scores"]["accuracy"] > 0.5
    assert "adds up as the party that all would trust" in capsys.readouterr().out
    masked = run_simulation(*shared, "cohort.quorum=5", "secagg=sa1", "evaluation.at_end=false")
    assert (masked["state"], masked["rounds"]) == ("done", 3)
    assert "the party that all would trust" not in capsys.readouterr().out


def test_a_simulation_learns() -> None:
    assert run_simulation("rounds=15")["scores"]["accuracy"] >= 0.95


def test_a_simulation_gives_the_same_model_again() -> None:
    one = run_simulation("seed=5")
    assert settled(one) == settled(run_simulation("seed=5"))
    assert one["model"] != run_simulation("seed=6")["model"]


def test_a_run_that_fails_says_so_with_its_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    gate = "gates=[{_target_: fedml.rounds.plan.Gate, metric: accuracy, at_least: 1.5}]"
    assert simulate([*QUICK, "rounds=1", gate]) == 1
    assert "failed: no candidate: gate accuracy" in capsys.readouterr().out


def test_the_configuration_can_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(["--cfg", "job", "strategy=fedadam"]) == 0
    assert "fedml.strategies.fedopt.FedAdam" in capsys.readouterr().out
    assert simulate(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"{group}: " in told for group in ("task", "strategy", "tracking", "executor"))
    assert simulate(["--no-such-flag"]) == 2


def test_hydra_explains_itself() -> None:
    done = program("--info", "defaults")
    assert done.returncode == 0
    assert "strategy/fedavg" in done.stdout


def test_a_folder_of_one_s_own_is_searched(tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "strategy").mkdir(parents=True)
    (own / "strategy" / "mine.yaml").write_text(
        "_target_: fedml.strategies.fedopt.FedAdam\nserver_lr: 0.5\n"
    )
    assert simulate(["--config-dir", str(own), "strategy=mine", "rounds=1", *QUICK]) == 0
    assert json.loads(Path("out/plan.json").read_text())["strategy"]["server_lr"] == 0.5


def test_a_recipe_file_of_one_s_own_is_found_by_its_name(tmp_path: Path) -> None:
    home = Path(fedml.recipes.breast_cancer.__file__)
    (tmp_path / "mine.py").write_text(home.read_text() + "\n# mine\n")
    own = ["recipes={mine: mine.py:BreastCancer}", "recipe.name=mine"]
    run_simulation(*own)
    assert json.loads(Path("out/plan.json").read_text())["recipe"]["name"] == "mine"
    with pytest.raises(FedmlError, match="no recipe 'mine' here"):
        simulate(own[1:])


def test_an_experiment_s_own_data_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "simulations"]:
        monkeypatch.delitem(sys.modules, name)  # ours, if another test has imported them
    folder = tmp_path / "simulations" / "probe"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "data.py").write_text(
        "from fedml.simulation.population import ShippedData\nclass Probe(ShippedData):\n    pass\n"
    )
    before = list(sys.path)
    run_simulation("data._target_=simulations.probe.data.Probe", "rounds=1")
    assert sys.path == before
    with pytest.raises(ConfigError, match=r"simulations\.probe\.data"):
        simulate(["data._target_=simulations.probe.data.Prob", "rounds=1"])


def test_nothing_of_the_process_is_left_changed() -> None:
    argv, environ = list(sys.argv), dict(os.environ)
    simulate(["rounds=1", *QUICK])
    with pytest.raises(FedmlError):
        simulate(["strategy=nope"])
    assert (sys.argv, dict(os.environ)) == (argv, environ)


# --- what is wrong -------------------------------------------------------------------------------

WRONG = [
    (["strategy.serverlr=1"], "did you mean strategy.server_lr?"),
    (["training.lr=fast"], "training.lr 'fast': must be a number"),
    (["population=files", "population.files={bern: nowhere.csv}"], "nowhere.csv"),
    (["population.sites=600"], "569 rows cannot go to 600 sites"),
    (["population.sites=2", "cohort.quorum=3"], "cohort.quorum 3 is above the 2 sites"),
    (["cohort.sites=[bern]"], "cohort.sites: bern not in the population"),
    (["executor.device=abacus"], "device 'abacus' is not here; there is cpu"),
    (["resume=nowhere"], "resume=nowhere: no config.yaml there"),
    (["checkpoint=often"], "checkpoint 'often': give the seconds"),
    (["--config-dir", "nowhere"], "nowhere' not found"),
]


@pytest.mark.parametrize(("argv", "line"), WRONG)
def test_what_cannot_be_is_one_line_before_anything_runs(argv: list[str], line: str) -> None:
    with pytest.raises(FedmlError) as caught:
        simulate([*argv, *QUICK])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("out", "summary.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"device 'cuda' is not here; there is cpu"):
        simulate(["executor.device=cuda", *QUICK])


@pytest.mark.parametrize("entry", ["fedml.simulate", "fedml"])
def test_the_program_fails_with_one_line_and_its_status(entry: str) -> None:
    first = ["simulate"] if entry == "fedml" else []
    done = program(*first, "rouds=3", entry=entry)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: rouds: no such setting; did you mean rounds?\n"


# --- tab completion ------------------------------------------------------------------------------


def complete(words: list[str]) -> list[str]:
    """Press tab behind `words` in a bash that has our script, with `fedml` on its path."""
    folder = Path("bin")
    folder.mkdir(exist_ok=True)
    (folder / "fedml").write_text(f'#!/bin/sh\nexec {sys.executable} -m fedml "$@"\n')
    (folder / "fedml").chmod(0o755)
    line = " ".join(words)
    quoted = " ".join(f"'{word}'" for word in words)
    script = (
        f'PATH="{folder.absolute()}:$PATH"; eval "$(fedml simulate -sc install=bash)"; '
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; "
        f'COMP_POINT={len(line)}; _fedml_simulate_complete; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, env=ENVIRONMENT, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_tab_completes_groups_choices_and_settings() -> None:
    assert {"strategy=fedavg", "strategy=fedprox"} <= set(
        complete(["fedml", "simulate", "strategy="])
    )
    assert complete(["fedml", "simulate", "strategy=fedprox", "strategy.m"]) == ["strategy.mu="]


def test_tab_completes_the_first_word_too() -> None:
    assert complete(["fedml", "simu"]) == ["simulate"]


# --- many jobs -----------------------------------------------------------------------------------


def test_several_jobs_run_with_m_whatever_becomes_of_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status = simulate(["-m", "population.sites=2,600,3", "rounds=1", "tracking=none",
                       "hydra.sweep.dir=many"])  # fmt: skip
    told = capsys.readouterr()
    assert status == 1
    assert "error: job 1: population.sites" in told.err or "job 1: 569 rows" in told.err
    assert "1 of 3 jobs failed" in told.err
    table = pd.read_parquet("many/sweep.parquet")
    assert list(table["state"]) == ["done", "failed", "done"]
    assert list(table["override.population.sites"]) == ["2", "600", "3"]
    assert table["score.accuracy"].notna().tolist() == [True, False, True]
    assert json.loads(Path("many/sweep.json").read_text())[2]["rounds"] == 1
    assert not Path("many/privacy-utility.png").exists()


def test_a_sweep_over_epsilon_draws_the_curve() -> None:
    assert simulate([
        "-m", "strategy=fedavg,fedavgm", "privacy=record", "privacy.epsilon=1,8", "seed=0,1",
        "rounds=1", "population.sites=2", "tracking=none", "hydra.sweep.dir=many",
    ]) == 0  # fmt: skip
    table = pd.read_parquet("many/sweep.parquet")
    assert table.groupby(["strategy", "epsilon"]).size().tolist() == [2, 2, 2, 2]
    assert (table["spent"] <= table["epsilon"]).all()
    assert Path("many/privacy-utility.png").read_bytes().startswith(b"\x89PNG")


def test_a_masked_simulation_comes_to_the_plain_one_s_model() -> None:
    run_simulation("cohort.quorum=3", "training.lr=0.1")
    plain = read(Path("out", "model.safetensors"))[""].clone()
    assert "mode: none" in Path("out", "config.yaml").read_text()
    veiled = run_simulation("cohort.quorum=3", "training.lr=0.1", "secagg=sa1")
    assert (veiled["state"], veiled["rounds"]) == ("done", 3)
    masked = read(Path("out", "model.safetensors"))[""]
    assert (masked - plain).norm() < 1e-6 < plain.norm()
    assert "mode: sa1" in Path("out", "config.yaml").read_text()


def test_who_counts_for_little_in_five_rounds_in_a_row_is_told_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    liars = ["experiment=robust", "attackers=inner_product", "attackers.sites=[guest-0,guest-1]"]
    run_simulation(*liars, "executor=inline", "rounds=4")
    assert "alert" not in capsys.readouterr().out
    run_simulation(*liars, "executor=inline", "rounds=5", "hydra.run.dir=again")
    told = [s for s in capsys.readouterr().out.splitlines() if s.startswith("alert: ")]
    assert [line.split()[1] for line in told] == ["guest-0", "guest-1"]
    assert all("counted for little in 5 rounds in a row" in line for line in told)
