"""Federated Newton finds the pooled maximum likelihood, and never under privacy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedml.errors import ConfigError, Contradiction, Refused
from fedml.learning.recipe import Recipe, Rows, identify
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task
from fedml.rounds import Cohort, Evaluation, Plan, Run
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.base import Holding, Memory
from fedml.simulation.executors.inline import Inline
from fedml.strategies import FedAvg, Newton, Strategy, measures
from fedml.strategies.newton import MOST, Curvature
from simulations.heart_disease.data import SOURCES, Hospitals
from simulations.heart_disease.figures import maximum_likelihood
from simulations.heart_disease.recipe import HeartDisease64
from tests.simulations.data import FOLDER, needs

RECORD = Privacy("record", epsilon=3.0, delta=1e-5, rounds=8, evaluation_epsilon=1.0)


def plan(strategy: Strategy, privacy: Privacy | None = None) -> Plan:
    return Plan(
        model="trial",
        recipe=identify("breast_cancer"),
        dataset="trial",
        strategy=strategy,
        training=Training(lr=0.1, steps=1),
        cohort=Cohort(quorum=1, deadline=60.0),
        rounds=8,
        privacy=privacy or Privacy(),
        evaluation=Evaluation(),
    )


def fitted(holdings: Mapping[SiteId, Holding]) -> Tensor:
    """Return weights and intercept after eight rounds of the production run."""
    a_plan, recipe = plan(Newton()), HeartDisease64()
    run = Run.begin(RunId("r"), a_plan, Params(recipe.build().state_dict()))
    engine = Engine(run, Inline(a_plan, recipe, holdings, Memory()), statuses(a_plan, holdings))
    outcome = engine.play()
    assert outcome.end.state == "done", outcome.end.detail
    assert outcome.candidate is not None
    found = outcome.candidate.params
    return torch.cat([found["weight"].reshape(-1), found["bias"]])


def pooled(holdings: Mapping[SiteId, Holding]) -> Rows:
    parts = [one.train for one in holdings.values()]
    return Rows(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))


def made_up() -> Mapping[SiteId, Holding]:
    """Three unlike sites of unlike sizes."""
    generator = torch.Generator().manual_seed(1)
    holdings = {}
    for number, size in enumerate((40, 90, 300)):
        x = torch.randn(size, 13, generator=generator, dtype=torch.float64) + 0.3 * number
        chance = torch.sigmoid(x[:, 0] - 0.5 * x[:, 1] + 0.2)
        y = (torch.rand(size, generator=generator, dtype=torch.float64) < chance).long()
        holdings[SiteId(f"s{number}")] = Holding(Rows(x, y), Rows(x[:5], y[:5]))
    return holdings


def test_made_up_sites_find_the_pooled_maximum_likelihood() -> None:
    sites = made_up()
    assert float((fitted(sites) - maximum_likelihood(pooled(sites))).abs().max()) < 1e-6


@needs(SOURCES["va"].place)
def test_four_hospitals_find_the_pooled_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDML_DATA", str(FOLDER))
    sites = Hospitals().deal(HeartDisease64(), None)
    best = maximum_likelihood(pooled(sites))
    assert float((fitted(sites) - best).abs().max()) < 1e-6
    fewer = {name: one for name, one in sites.items() if name != "va"}
    other = maximum_likelihood(pooled(fewer))
    assert float((other - best).abs().max()) > 0.01  # so agreeing is no accident


def test_the_reference_is_the_optimum_that_scikit_learn_finds() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows = pooled(made_up())
    model = linear_model.LogisticRegression(C=1e12, tol=1e-12, max_iter=10_000)
    model.fit(rows.x.numpy(), rows.y.numpy())
    found = torch.tensor([*model.coef_[0], *model.intercept_])
    assert float((found - maximum_likelihood(rows)).abs().max()) < 1e-4


def task(params: Params, rule: str = "newton") -> Task:
    return Task(TaskId("t"), RunId("r"), 1, SiteId("s"), "train", Brief(params, rule))


def trainer(privacy: Privacy | None = None) -> Trainer:
    recipe: Recipe = HeartDisease64()
    return Trainer(recipe, Training(lr=0.1, steps=1), privacy or Privacy())


def test_a_site_sends_its_gradient_and_hessian_and_its_row_count() -> None:
    rows = made_up()[SiteId("s1")].train
    params = Params({"weight": torch.full((1, 13), 0.1).double(), "bias": torch.ones(1).double()})
    update, kept = trainer().train(task(params), rows, {}, seed=0)
    x = torch.cat([torch.ones(len(rows), 1).double(), rows.x], dim=1)  # the buffer: bias first
    chance = torch.sigmoid(x @ params.buffers[torch.float64])
    gradient = x.T @ (chance - rows.y) / len(rows)
    hessian = x.T @ ((chance * (1 - chance))[:, None] * x) / len(rows)
    assert torch.allclose(update.delta.buffers[torch.float64], -gradient)
    sent = [update.slots[f"hessian.{k}"].buffers[torch.float64] for k in range(14)]
    assert torch.allclose(torch.stack(sent), hessian)
    assert update.slots.keys() == Curvature().reports(Brief(params, "newton"))
    assert (update.weight, kept) == (90.0, {})


def test_privacy_refuses_it_in_the_plan_and_again_at_the_site() -> None:
    with pytest.raises(Contradiction, match=r"Newton with record privacy: .*use strategy=fedavg"):
        plan(Newton(), RECORD)
    plan(FedAvg(), RECORD)
    assert measures(Newton()) and not measures(FedAvg())
    params = Params(HeartDisease64().build().state_dict())
    with pytest.raises(Refused, match="rule newton reports exact numbers made of rows"):
        trainer(RECORD).train(
            task(params), made_up()[SiteId("s0")].train, {}, seed=0, public_rows=40
        )


def test_a_model_that_is_too_big_is_told_before_anything_runs() -> None:
    big = Params(nn.Linear(MOST, 2).state_dict())
    with pytest.raises(ConfigError, match=r"1 to 500 parameters .* has 1002 of torch.float32"):
        Run.begin(RunId("r"), plan(Newton()), big)


def test_a_site_without_rows_says_so() -> None:
    params = Params(HeartDisease64().build().state_dict())
    rows = Rows(torch.zeros(0, 13).double(), torch.zeros(0).long())
    with pytest.raises(ConfigError, match="no rows to measure"):
        trainer().train(task(params), rows, {}, seed=0)


def test_a_shorter_step_and_a_ridge_steady_it() -> None:
    sites = made_up()
    one = Inline(plan(Newton()), HeartDisease64(), sites, Memory())
    params = Params(HeartDisease64().build().state_dict())
    moved = []
    for strategy in (Newton(), Newton(server_lr=0.5), Newton(ridge=1.0)):
        reduction, state = strategy.reducer.start(), strategy.start(params)
        for site in sites:
            brief = strategy.brief(state)
            (update,) = one.run([replace(task(params), site=site, brief=brief)])
            reduction.add(update)  # type: ignore[arg-type]
        moved.append((strategy.advance(state, reduction.result()).params - params).norm())
    assert moved[1] == pytest.approx(moved[0] / 2)
    assert moved[2] < 0.5 * moved[0]
