"""Configurations become objects; whatever is wrong with them is one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

import fedml.recipes.breast_cancer
from fedml.cli.compose import compose_plan, configs
from fedml.cli.simulate import simulate
from fedml.errors import ConfigError, Contradiction, FedmlError
from fedml.rounds import Gate, Plan, Wire
from fedml.strategies import REDUCERS, FedAdam, FedAvg, FedProx, build, describe
from fedml.strategies.robust import Krum

RUN = ["task=breast_cancer", "cohort.quorum=2", "cohort.deadline=60"]
GROUPS = sorted(f"{path.parent.name}={path.stem}" for path in configs().glob("*/*.yaml"))
NEEDED = {
    "strategy=cyclic": ["cohort.size=1", "cohort.quorum=1"],
    "privacy=record": ["privacy.epsilon=3"],
    "privacy=record_distributed": ["privacy.epsilon=3", "training.steps=1"],
    "privacy=patient": ["privacy.epsilon=3"],
    "privacy=site_central": ["privacy.epsilon=3", "evaluation.at_end=false"],
    "privacy=site_distributed": ["privacy.epsilon=3", "evaluation.at_end=false"],
    "secagg=sa1": ["cohort.quorum=3"],
    "population=files": ["population.files={bern: bern.csv}"],
    "population=column": ["population.column=target"],
    "population=crowd": ["cohort.size=5"],
    "task=own": ["model=breast_cancer", "training.lr=1", "training.steps=1"],
    "strategy=own": [f"strategy.file={__file__}:Mine"],
    "population=shards": ["population.drop_rest=true"],
}


@dataclass(frozen=True)
class Mine(FedAvg):
    """A strategy of the user's own, in the user's own file."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDML_DATA", str(tmp_path))


@pytest.mark.parametrize("choice", GROUPS)
def test_every_configuration_builds(choice: str) -> None:
    plan = compose_plan("simulate", [choice, *NEEDED.get(choice, [])])
    assert Plan.from_json(plan.to_json()) == plan


def test_every_strategy_has_a_configuration_with_its_defaults() -> None:
    from fedml.strategies import catalogue

    for name in catalogue.STRATEGIES.ours:
        choice = f"strategy={name}"
        plan = compose_plan("simulate", [choice, *NEEDED.get(choice, [])])
        assert describe(plan.strategy) == describe(build({"name": name}))


@pytest.mark.parametrize("name", REDUCERS)
def test_every_reducer_has_a_configuration_with_its_defaults(name: str) -> None:
    choice = [f"strategy/reducer={name.replace('-', '_')}", "cohort.quorum=7"]
    for strategy in ("fedavg", "fedadam"):
        plan = compose_plan("simulate", [f"strategy={strategy}", *choice])
        wanted = build({"name": strategy, "reducer": {"name": name}})
        assert plan.strategy == wanted


def test_a_reducer_is_set_as_any_part_is() -> None:
    words = ["strategy/reducer=krum", "strategy.reducer.f=2", "strategy.reducer.before=[arc,nnm]"]
    plan = compose_plan("run", [*RUN, *words, "cohort.quorum=7"])
    assert plan.strategy.reducer == Krum(f=2, before=("arc", "nnm"))
    with pytest.raises(ConfigError, match="quorum 2 with reducer Krum, which needs 7 updates"):
        compose_plan("run", [*RUN, *words])
    with pytest.raises(ConfigError, match=r"reducer\.f 2\.5: must be a whole"):
        compose_plan("simulate", ["strategy/reducer=krum", "strategy.reducer.f=2.5"])


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


def test_how_bytes_travel_is_two_words_of_a_plan() -> None:
    plan = compose_plan("run", [*RUN, "wire.down=bf16+delta", "wire.up=bf16+zstd"])
    assert plan.wire == Wire(down="bf16+delta", up="bf16+zstd")
    assert compose_plan("run", RUN).wire == Wire()
    with pytest.raises(ConfigError, match=r"wire\.up 'delta': use one of") as caught:
        compose_plan("run", [*RUN, "wire.up=delta"])
    assert "\n" not in str(caught.value)


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


def test_a_recipe_file_of_one_s_own_is_found_by_its_name(tmp_path: Path) -> None:
    home = Path(fedml.recipes.breast_cancer.__file__)
    (tmp_path / "mine.py").write_text(home.read_text() + "\n# mine\n")
    own = ["++recipes={mine: mine.py:BreastCancer}", "recipe.name=mine"]
    assert compose_plan("run", [*RUN, *own]).recipe.name == "mine"
    with pytest.raises(FedmlError, match="no recipe 'mine' here"):
        compose_plan("run", [*RUN, *own[1:]])


def test_only_a_simulation_builds_what_is_its_user_s_own() -> None:
    with pytest.raises(ConfigError, match=r"recipe._target_ .*only names below fedml\. are built"):
        compose_plan("simulate", ["recipe._target_=simulations.probe.data.Probe"])


WRONG = [
    (["strategy=fedsgd"], r"strategy=fedsgd: no such choice; did you mean fed.*\?"),
    (["strategy=krum"], "strategy=krum: no such choice; there are cyclic, ditto"),
    (["strategy.nu=3"], "strategy.nu: no such setting; there are strategy.average_from"),
    (["strategy.serverlr=3"], r"strategy.serverlr: no .*; did you mean strategy.server_lr\?"),
    (["strategy=fedprox", "strategy.m=3"], r"strategy.m: no such setting; .*strategy.mu"),
    (["trainin.lr=3"], r"trainin.lr: no such setting; did you mean training.lr"),
    (["stratgy=fedavg"], r"stratgy: no such setting; did you mean strategy\?"),
    (["rouds=3"], r"rouds: no such setting; did you mean rounds\?"),
    (["+strategy.nu=3"], "unexpected keyword argument 'nu'"),
    (["+zzyzx=3"], "zzyzx: no such setting; there are attackers, attempts, "),
    (["+evaluaton=3"], r"evaluaton: no such setting; did you mean evaluation\?"),
    (["rounds=[1"], "no viable alternative"),
    (["rounds=five"], "five|privacy: "),
    (["training.lr=fast"], "training.lr 'fast': must be a number"),
    (["seed=five"], "seed 'five': must be a whole number"),
    (["cohort.quorum=two"], "cohort.quorum 'two': must be a whole number"),
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
