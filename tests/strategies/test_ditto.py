"""Ditto against its paper, and its two models at real sites, with privacy and without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedml.errors import ConfigError, Contradiction, Refused, TaskFailed
from fedml.learning.evaluation import evaluate
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task
from fedml.rounds import Evaluation, Plan
from fedml.simulation.executors.base import MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.processes import Processes
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import Ditto, FedAvg, Strategy
from tests.simulation.worlds import engine, holdings, plan, recipe, start
from tests.strategies.quadratics import (
    CENTRES,
    CURVES,
    SHARES,
    Quadratics,
    Vector,
    descend,
    gradient,
)

RECORD = Privacy("record", epsilon=2.0, delta=1e-5, evaluation_epsilon=1.0, rounds=3)


def paper(rounds: int, lam: float, lr: float = 0.1, steps: int = 4) -> tuple[Vector, Vector]:
    """Algorithm 1: the global model, and those of three sites."""
    w, own = np.zeros(3), np.zeros((3, 3))
    for _ in range(rounds):
        for k in range(3):
            for _ in range(steps):
                own[k] = own[k] - lr * (gradient(k, own[k]) + lam * (own[k] - w))
        w = SHARES @ np.array([descend(k, w, lr, steps) for k in range(3)])
    return w, own


def owns(federation: Quadratics) -> Vector:
    return np.array([federation.memory[k]["own"]["w"].numpy() for k in range(3)])


@pytest.mark.parametrize("lam", [0.0, 0.3, 4.0])
def test_it_is_algorithm_1_of_li_2021(lam: float) -> None:
    federation = Quadratics(Ditto(lam))
    w, own = paper(7, lam)
    np.testing.assert_allclose(federation.play(7), w, atol=1e-7)
    np.testing.assert_allclose(owns(federation), own, atol=1e-7)


def test_own_models_come_to_rest_between_their_optimum_and_the_global_one() -> None:
    federation = Quadratics(Ditto(0.5))
    w = federation.play(150)
    np.testing.assert_allclose(w, Quadratics(FedAvg()).play(150), atol=1e-12)
    rest = (CURVES * CENTRES + 0.5 * w) / (CURVES + 0.5)  # of F_k(v) + lam / 2 ||v - w||^2
    np.testing.assert_allclose(owns(federation), rest, atol=1e-5)


def test_the_stronger_the_pull_the_nearer_are_own_models_to_the_global_one() -> None:
    gaps = []
    for lam in (0.0, 1.0, 9.0):
        federation = Quadratics(Ditto(lam))
        w = federation.play(60)
        gaps.append(float(np.abs(owns(federation) - w).max()))
    assert gaps[0] > 2 * gaps[1] > 8 * gaps[2] > 0


def test_a_restart_in_the_middle_changes_no_bit() -> None:
    whole, parted = Quadratics(Ditto(0.3)), Quadratics(Ditto(0.3))
    parted.play(3)
    parted = parted.restarted()
    np.testing.assert_array_equal(parted.play(4), whole.play(7))
    np.testing.assert_array_equal(owns(parted), owns(whole))


def of(strategy: Strategy, **changes: object) -> Plan:
    return replace(plan(strategy=strategy, rounds=3), **changes)  # type: ignore[arg-type]


def final(a_plan: Plan, make: MakeExecutor = Inline) -> tuple[Params, Memory, Mapping[str, float]]:
    memory = Memory()
    candidate = engine(a_plan, make(a_plan, recipe(), holdings(), memory)).play().candidate
    assert candidate is not None
    return candidate.params, memory, candidate.scores


@pytest.mark.parametrize("make", [Inline, Vectorised, Processes])
def test_without_a_pull_each_site_learns_alone_and_the_global_model_is_fedavgs(
    make: MakeExecutor,
) -> None:
    a_plan = of(Ditto(0.0))
    params, memory, scores = final(a_plan, make)
    assert params == final(of(FedAvg()))[0]
    trainer, right, rows = Trainer(recipe(), a_plan.training, Privacy()), 0.0, 0.0
    for site, holding in holdings().items():
        alone = start()
        for number in range(1, 4):
            task = Task(TaskId("t"), RunId("r"), number, site, "train", Brief(alone))
            seed = a_plan.task_seed(number, site)
            update, _ = trainer.train(task, holding.train, {}, seed=seed)
            alone = alone + update.delta
        assert memory.slots[site]["own"] == alone
        task = Task(TaskId("t"), RunId("r"), 3, site, "evaluate", Brief(alone))
        report = evaluate(recipe(), task, holding.held_out, Privacy())
        right, rows = right + report.totals["accuracy"], rows + report.count
    assert scores["accuracy"] == pytest.approx(right / rows, rel=1e-9)  # each with its own


def test_at_a_site_the_own_model_is_pulled_from_where_it_is_to_the_global_one() -> None:
    site, lam, training = SiteId("site-0"), 0.2, Training(lr=0.5, steps=1)
    rows, far = holdings()[site].train, start().map(lambda b: b + 0.1)
    trainer = Trainer(recipe(), training, Privacy())

    def task(strategy: Strategy, params: Params) -> Task:
        brief = strategy.brief(strategy.start(params))
        return Task(TaskId("t"), RunId("r"), 1, site, "train", brief)

    update, kept = trainer.train(task(Ditto(lam), start()), rows, {"own": far}, seed=1)
    alone, _ = trainer.train(task(FedAvg(), far), rows, {}, seed=1)
    pulled = (far + alone.delta) - (far - start()) * (0.5 * lam)
    assert (kept["own"] - pulled).norm() < 1e-6
    plain, _ = trainer.train(task(FedAvg(), start()), rows, {}, seed=1)
    assert update.delta == plain.delta


def test_record_privacy_hides_the_global_model_and_leaves_the_own_one_as_it_is() -> None:
    silent = Evaluation(at_end=False)
    params, memory, _ = final(of(Ditto(0.0), privacy=RECORD, evaluation=silent))
    _, plain, _ = final(of(Ditto(0.0)))
    assert memory.slots == plain.slots  # no noise on what never leaves
    again, _, _ = final(of(Ditto(0.0), privacy=RECORD, evaluation=silent))
    assert params != again  # and fresh noise on what does


def test_privacy_takes_no_scores_of_own_models_at_the_plan_nor_at_a_site() -> None:
    with pytest.raises(Contradiction, match=r"strategy Ditto and record privacy: sites score mod"):
        of(Ditto(), privacy=RECORD)
    site = SiteId("site-0")
    brief = Ditto().brief(Ditto().start(start()))
    task = Task(TaskId("t"), RunId("r"), 1, site, "evaluate", brief)
    with pytest.raises(Refused, match=r"own model is made of its rows without noise"):
        evaluate(recipe(), task, holdings()[site].held_out, RECORD, memory={"own": start()})


def test_that_the_own_model_diverged_is_told_only_without_privacy() -> None:
    site = SiteId("site-0")
    strategy = Ditto(1e30)
    task = Task(TaskId("t"), RunId("r"), 1, site, "train", strategy.brief(strategy.start(start())))
    rows, far = holdings()[site].train, {"own": start().map(torch.ones_like)}
    training = Training(lr=2.0, steps=3, batch_size=32)
    with pytest.raises(TaskFailed, match="left the finite numbers"):
        Trainer(recipe(), training, Privacy()).train(task, rows, far, seed=1)
    private = Trainer(recipe(), training, RECORD)
    update, kept = private.train(task, rows, far, seed=1, public_rows=len(rows))
    assert update.delta.is_finite()
    assert kept["own"] == start()  # begun again


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ditto.lam -1.0: must be 0 or more"):
        Ditto(-1.0)
    with pytest.raises(ConfigError, match=r"ditto.server_lr 0.0: must be above 0"):
        Ditto(server_lr=0.0)
