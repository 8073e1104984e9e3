"""A plan of ours as a Flower app comes to the model that our own halves come to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.racers.flower_runtime import runtime
from fedml.cli.compose import compose_plan
from fedml.errors import ConfigError, QuorumLost
from fedml.flower import export, simulation
from fedml.learning.recipe import load
from fedml.learning.trainer import Trainer
from fedml.params import Params, read
from fedml.protocol.messages import RunId, SiteId, TaskId
from fedml.protocol.tasks import Slots, Task
from fedml.recipes.breast_cancer import FEATURES
from fedml.rounds.answers import Updates
from fedml.rounds.plan import Plan
from fedml.strategies import reports

SITES, ROUNDS = 3, 3


def plan_of(*words: str) -> Plan:
    common = ("task=breast_cancer", "cohort.quorum=2", "cohort.deadline=60", f"rounds={ROUNDS}")
    return compose_plan("run", [*common, "privacy=none", *words])


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test import an app of its own: they have one name."""
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "fedml_app", raising=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    chance = torch.Generator().manual_seed(1)
    for site in range(SITES):
        for part in ("train", "held-out"):
            values = torch.rand(20 + site, len(FEATURES), generator=chance) * 10
            lines = [",".join([*FEATURES, "malignant"])]
            lines += [
                ",".join([*(f"{v:.4f}" for v in row.tolist()), str(int(row[0] > 5))])
                for row in values
            ]
            (folder / f"{part}-{site}.csv").write_text("\n".join(lines) + "\n")
    return folder


def settings(rows: Path) -> str:
    place = "{partition-id}"
    return f"train='{rows}/train-{place}.csv' held-out='{rows}/held-out-{place}.csv'"


def by_hand(plan: Plan, rows: Path, sites: int = SITES, rounds: int = ROUNDS) -> Params:
    """Return the model after the plan's rounds, by our own halves and nothing of Flower."""
    recipe = load(plan.recipe)
    torch.manual_seed(plan.seed)
    state = plan.strategy.start(Params(recipe.build().state_dict()))
    trainer = Trainer(recipe, plan.training, plan.privacy)
    memories: list[Slots] = [{} for _ in range(sites)]
    for number in range(1, rounds + 1):
        brief = plan.strategy.brief(state)
        updates = Updates(plan.reducer, reports(brief))
        for k in range(sites):
            site = SiteId(f"site-{k}")
            task = Task(TaskId(f"t.{number}.{k}"), RunId("t"), number, site, "train", brief)
            data = recipe.read(rows / f"train-{k}.csv")
            seed = plan.task_seed(number, site)
            update, memories[k] = trainer.train(task, data, memories[k], seed=seed)
            updates.add(update, brief)
        state = plan.strategy.advance(state, updates.result())
    return state.params


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "scaffold", "fednova"])
def test_an_exported_plan_comes_to_the_same_bits(strategy: str, rows: Path, tmp_path: Path) -> None:
    plan = plan_of(f"strategy={strategy}", "training.batch_size=8")
    export.write(plan, tmp_path / "app")
    setup = simulation.prepare(tmp_path / "app", (settings(rows),), SITES)
    outcome = simulation.play(setup, tmp_path / "run")
    assert not outcome.failures
    assert read(tmp_path / "run" / outcome.model)[""] == by_hand(plan, rows)
    assert outcome.train[ROUNDS]["updates"] == SITES
    assert outcome.evaluate.keys() == {ROUNDS}  # when it is due
    assert 0 <= float(str(outcome.evaluate[ROUNDS]["accuracy"])) <= 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_comes_to_the_same_bits_under_flowers_own_runtime(rows: Path, tmp_path: Path) -> None:
    plan, model = plan_of("strategy=scaffold", "evaluation.at_end=false"), tmp_path / "model"
    export.write(plan, tmp_path / "app")
    with runtime(tmp_path / "flower") as run:
        run(tmp_path / "app", f"rounds=2 model='{model}' {settings(rows)}", model.exists)
    assert read(model)[""] == by_hand(plan, rows, sites=2, rounds=2)


def test_a_site_that_fails_does_not_count_and_too_few_end_the_run(
    rows: Path, tmp_path: Path
) -> None:
    export.write(plan_of("evaluation.at_end=false"), tmp_path / "app")
    setup = simulation.prepare(tmp_path / "app", (settings(rows),), SITES + 1)
    outcome = simulation.play(setup, tmp_path / "run")
    assert outcome.train[ROUNDS]["updates"] == SITES
    assert {site for sites in outcome.failures.values() for site in sites} == {SITES}
    setup = simulation.prepare(tmp_path / "app", (), SITES)
    with pytest.raises(QuorumLost, match=r"round 1: 0 updates, quorum 2.*no file 'train'"):
        simulation.play(setup, tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("privacy=record", "privacy.epsilon=1"), "the ledger that charges it is our sites'"),
        (("cohort.sites=[bern,chur]",), "parent and cohort.sites"),
    ],
)
def test_what_flower_cannot_keep_is_refused(
    words: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    common = ("task=breast_cancer", "cohort.quorum=2", "cohort.deadline=60")
    with pytest.raises(ConfigError, match=reason):
        export.write(compose_plan("run", [*common, *words]), tmp_path)
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match="has something in it"):
        export.write(plan_of(), tmp_path)
