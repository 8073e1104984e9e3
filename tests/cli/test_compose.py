"""Configurations become objects; whatever is wrong with them is one line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

import fedml.recipes.breast_cancer
from fedml.cli.compose import compose_plan, configs, simulate
from fedml.errors import ConfigError, Contradiction, FedmlError
from fedml.rounds import Gate, Plan
from fedml.strategies import FedAdam, FedProx, describe

RUN = ["task=breast_cancer", "cohort.quorum=2", "cohort.deadline=60"]
GROUPS = sorted(f"{path.parent.name}={path.stem}" for path in configs().glob("*/*.yaml"))
NEEDED = {
    "privacy=record": ["privacy.epsilon=3"],
    "population=files": ["population.files={bern: bern.csv}"],
    "task=own": ["model=breast_cancer", "training.lr=1", "training.steps=1"],
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDML_DATA", str(tmp_path))


def run_simulation(*overrides: str) -> dict[str, object]:
    assert simulate(["rounds=3", "hydra.run.dir=out", *overrides]) == 0
    summary: dict[str, object] = json.loads(Path("out", "summary.json").read_text())
    return summary


@pytest.mark.parametrize("choice", GROUPS)
def test_every_configuration_builds(choice: str) -> None:
    plan = compose_plan("simulate", [choice, *NEEDED.get(choice, [])])
    assert Plan.from_json(plan.to_json()) == plan


def test_every_strategy_has_a_configuration_with_its_defaults() -> None:
    from fedml.strategies import build, catalogue

    for name in catalogue._OURS:
        plan = compose_plan("simulate", [f"strategy={name}"])
        assert describe(plan.strategy) == describe(build({"name": name}))


def test_a_run_s_plan_comes_from_overrides() -> None:
    plan = compose_plan(
        "run",
        [
            *RUN, "strategy=fedprox", "strategy.mu=0.5", "rounds=7", "privacy=record",
            "privacy.epsilon=2", "cohort.sites=[bern,kyoto]",
            "gates=[{_target_: fedml.rounds.plan.Gate, metric: accuracy, at_least: 0.9}]",
        ],
    )  # fmt: skip
    assert plan.strategy == FedProx(mu=0.5)
    assert (plan.rounds, plan.privacy.rounds, plan.privacy.epsilon) == (7, 7, 2.0)
    assert plan.cohort.sites == ("bern", "kyoto")
    assert plan.gates == (Gate(metric="accuracy", at_least=0.9),)


def test_a_run_must_say_what_it_cannot_guess() -> None:
    with pytest.raises(ConfigError, match="specify 'task'"):
        compose_plan("run", [])
    with pytest.raises(ConfigError, match=r"cohort.deadline, cohort.quorum must be given: add"):
        compose_plan("run", ["task=breast_cancer"])


def test_a_folder_of_one_s_own_is_searched_too(tmp_path: Path) -> None:
    own = tmp_path / "my, 'own' configs"
    own.mkdir()
    (own / "strategy").mkdir()
    (own / "strategy" / "mine.yaml").write_text(
        "_target_: fedml.strategies.fedopt.FedAdam\nserver_lr: 0.5\n"
    )
    (own / "trial.yaml").write_text("defaults: [run, override task: breast_cancer, _self_]\n")
    assert compose_plan("run", [*RUN, "strategy=mine"], own).strategy == FedAdam(server_lr=0.5)
    assert compose_plan("trial", RUN[1:], own).model == "breast_cancer"
    assert simulate(["--config-dir", str(own), "strategy=mine", "rounds=1"]) == 0


def test_a_recipe_file_of_one_s_own_is_found_by_its_name(tmp_path: Path) -> None:
    home = Path(fedml.recipes.breast_cancer.__file__)
    (tmp_path / "mine.py").write_text(home.read_text() + "\n# mine\n")
    own = ["+recipes={mine: mine.py:BreastCancer}", "recipe.name=mine"]
    assert compose_plan("run", [*RUN, *own]).recipe.name == "mine"
    assert simulate([*own, "rounds=1"]) == 0
    with pytest.raises(FedmlError, match="no recipe 'mine' here"):
        simulate(own[1:])


def test_an_experiment_s_own_data_and_population_are_built(tmp_path: Path) -> None:
    folder = tmp_path / "simulations" / "probe"
    folder.mkdir(parents=True)
    (folder / "data.py").write_text(
        "from fedml.simulation.population import ShippedData\nclass Probe(ShippedData):\n    pass\n"
    )
    target = "data._target_=simulations.probe.data.Probe"
    assert simulate([target, "rounds=1"]) == 0
    with pytest.raises(ConfigError, match=r"recipe._target_ .*only names below fedml\. are built"):
        compose_plan("simulate", ["recipe._target_=simulations.probe.data.Probe"])
    with pytest.raises(ConfigError, match=r"simulations\.probe\.data"):
        simulate(["data._target_=simulations.probe.data.Prob", "rounds=1"])


WRONG = [
    (["strategy=fedsgd"], "Could not find 'strategy/fedsgd' Available options in 'strategy': fed"),
    (["strategy.nu=3"], "Could not override 'strategy.nu'"),
    (["+strategy.nu=3"], "unexpected keyword argument 'nu'"),
    (["+foo=3"], "foo: no such setting; there are model, recipe"),
    (["rounds=[1"], "no viable alternative"),
    (["rounds=five"], "five|privacy: "),
    (["seed=five"], "plan.seed 'five': must be a whole number"),
    (["cohort.quorum=two"], "plan.cohort.quorum 'two': must be a whole number"),
    (["strategy.server_lr=-1"], "fedavg.server_lr -1: must be above 0"),
    (["training.lr=-1", "strategy.server_lr=-1"], "training.lr -1.*fedavg.server_lr -1"),
    (["privacy=record"], "privacy.epsilon must be given: add privacy.epsilon=..."),
    (["rounds=${missing}"], "missing"),
    (["recipe.name=unknown"], "no recipe 'unknown' here"),
    (["strategy=null"], "must be a string or a list. Got NoneType"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_what_is_wrong_is_one_line(overrides: list[str], message: str) -> None:
    for attempt in (lambda: compose_plan("simulate", overrides), lambda: simulate(overrides)):
        with pytest.raises(FedmlError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert "Config search path" not in str(caught.value)


def test_contradictions_come_all_at_once() -> None:
    overrides = ["cohort.quorum=9", "cohort.size=2", "attempts=0"]
    with pytest.raises(ConfigError, match=r"attempts 0.*quorum 9 is above cohort.size 2"):
        compose_plan("simulate", overrides)
    assert issubclass(Contradiction, ConfigError)


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Cannot find primary config 'nope'"):
        compose_plan("nope", [])
    with pytest.raises(ConfigError, match=r"--config-dir .* is no folder"):
        compose_plan("run", RUN, tmp_path / "nope")
    with pytest.raises(ConfigError, match="nope' not found"):
        simulate(["--config-dir", str(tmp_path / "nope")])


@pytest.mark.parametrize("privacy", [[], ["privacy=record", "privacy.epsilon=8"]])
def test_a_simulation_runs_end_to_end(privacy: list[str]) -> None:
    summary = run_simulation("strategy=fedprox", "strategy.mu=0.1", "seed=3", *privacy)
    assert summary["state"] == "done"
    assert summary["rounds"] == 3
    epsilon = summary["epsilon"]
    assert isinstance(epsilon, dict)
    assert len(epsilon) == 5
    assert all((7 < spent <= 8) if privacy else spent == 0 for spent in epsilon.values())
    files = {path.name for path in Path("out").iterdir()}
    assert files >= {"config.yaml", "results.csv", "summary.json", "plan.json", "model.safetensors"}
    assert "rounds: 3" in Path("out", "config.yaml").read_text()
    assert "${" not in Path("out", "config.yaml").read_text()


def test_a_simulation_learns() -> None:
    summary = run_simulation("rounds=15")
    scores = summary["scores"]
    assert isinstance(scores, dict)
    assert scores["accuracy"] >= 0.95


def test_a_simulation_gives_the_same_model_again() -> None:
    one, again = run_simulation("seed=5"), run_simulation("seed=5", "hydra.run.dir=again")
    assert one == again


def test_a_run_that_fails_says_so_with_its_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    gate = "gates=[{_target_: fedml.rounds.plan.Gate, metric: accuracy, at_least: 1.5}]"
    assert simulate(["rounds=1", gate]) == 1
    assert "failed: no candidate: gate accuracy" in capsys.readouterr().out


def test_the_configuration_can_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(["--cfg", "job", "strategy=fedadam"]) == 0
    assert "fedml.strategies.fedopt.FedAdam" in capsys.readouterr().out
    assert simulate(["--help"]) == 0
    assert simulate(["--no-such-flag"]) == 2


def test_several_jobs_run_with_m(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(["-m", "rounds=1,2", "hydra.sweep.dir=many"]) == 0
    found = [json.loads(path.read_text())["rounds"] for path in Path("many").glob("*/summary.json")]
    assert sorted(found) == [1, 2]


def test_nothing_of_the_process_is_left_changed() -> None:
    argv, environ = list(sys.argv), dict(os.environ)
    simulate(["rounds=1"])
    with pytest.raises(FedmlError):
        simulate(["strategy=nope"])
    assert (sys.argv, dict(os.environ)) == (argv, environ)
