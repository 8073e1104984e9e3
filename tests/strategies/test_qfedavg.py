"""q-FedAvg against its paper, how fair it is, and that it asks for exact losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedml.errors import ConfigError, Contradiction, Refused, TaskFailed
from fedml.learning.recipe import Rows, identify
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task
from fedml.rounds import Cohort, Evaluation, Plan
from fedml.strategies import FedAvg, QFedAvg, measures
from fedml.strategies.qfedavg import Fair
from tests.simulation.worlds import holdings, recipe, start
from tests.strategies.quadratics import SHARES, Quadratics, Vector, descend, loss, params

RECORD = Privacy("record", epsilon=3.0, delta=1e-5, rounds=8, evaluation_epsilon=1.0)


def paper(rounds: int, q: float) -> Vector:
    """Algorithm 2 with L = 1 / 0.1, written out."""
    w = np.zeros(3)
    for _ in range(rounds):
        pushes, h = np.zeros((3, 3)), np.zeros(3)
        for k in range(3):
            pull = (w - descend(k, w, 0.1, 4)) / 0.1
            pushes[k] = loss(k, w) ** q * pull
            h[k] = q * loss(k, w) ** (q - 1) * np.sum(pull**2) + loss(k, w) ** q / 0.1
        w = w - (SHARES @ pushes) / (SHARES @ h)
    return w


@pytest.mark.parametrize("q", [0.5, 1.0, 3.0])
def test_it_is_algorithm_2_of_li_2020(q: float) -> None:
    np.testing.assert_allclose(Quadratics(QFedAvg(q)).play(12), paper(12, q), atol=1e-6)


def test_without_q_it_is_fedavg() -> None:
    ours, avg = Quadratics(QFedAvg(0.0)).play(12), Quadratics(FedAvg()).play(12)
    np.testing.assert_allclose(ours, avg, atol=1e-7)


def test_the_larger_q_the_more_alike_the_losses() -> None:
    spread = []
    for q in (0.0, 1.0, 5.0):
        w = Quadratics(QFedAvg(q)).play(600)
        spread.append(float(np.std([loss(k, w) for k in range(3)])))
    assert spread[0] > 1.2 * spread[1] > 1.44 * spread[2]


def test_losses_of_zero_move_nothing_and_break_nothing() -> None:
    told, _ = Fair().finish(
        Brief(params(np.zeros(3)), "qfedavg", {"q": 0.5}),
        {},
        params(np.zeros(3)),
        {"lr": 0.1, "momentum": 0.0, "steps": 1.0, "loss": 0.0},
    )
    assert all(part.is_finite() for part in told.values())
    federation = Quadratics(QFedAvg(5.0))
    reduction = federation.strategy.reducer.start()
    update = federation.update(federation.strategy.brief(federation.state), 0)
    nothing = {"h": update.slots["h"] * 0.0}
    reduction.add(type(update)(**{**vars(update), "slots": nothing}))
    after = federation.strategy.advance(federation.state, reduction.result())
    assert after.params == federation.state.params


def test_a_negative_loss_is_told() -> None:
    with pytest.raises(TaskFailed, match="a loss of -1: its power needs a loss of 0 or more"):
        Fair().finish(Brief(start(), "qfedavg", {"q": 1.0}), {}, start(), {"lr": 0.1, "loss": -1.0})


def task() -> Task:
    brief = QFedAvg(1.0).brief(QFedAvg(1.0).start(start()))
    return Task(TaskId("t"), RunId("r"), 1, SiteId("s"), "train", brief)


def test_a_site_reads_its_loss_of_all_rows_at_the_global_model() -> None:
    training, rows = Training(lr=0.1, steps=2, batch_size=16), holdings()[SiteId("site-1")].train
    update, _ = Trainer(recipe(), training, Privacy()).train(task(), rows, {}, seed=0)
    plain = Task(TaskId("t"), RunId("r"), 1, SiteId("s"), "train", Brief(start()))
    path, _ = Trainer(recipe(), training, Privacy()).train(plain, rows, {}, seed=0)
    model = recipe().build()
    model.load_state_dict(dict(start()))
    with torch.no_grad():
        there = float(recipe().loss(model(rows.x), rows.y))
    assert (update.delta - path.delta * there).norm() < 1e-5 * update.delta.norm()
    h = path.delta.norm() ** 2 / 0.1 + there
    assert float(update.slots["h"]["value"]) == pytest.approx(h, rel=1e-5)


def test_privacy_refuses_it_in_the_plan_and_again_at_the_site() -> None:
    def plan(strategy: QFedAvg | FedAvg) -> Plan:
        return Plan(
            model="trial", recipe=identify("breast_cancer"), dataset="trial", strategy=strategy,
            training=Training(lr=0.1, steps=1), cohort=Cohort(quorum=1, deadline=60.0), rounds=8,
            privacy=RECORD, evaluation=Evaluation(),
        )  # fmt: skip

    with pytest.raises(Contradiction, match=r"QFedAvg with record privacy: .*use strategy=fedavg"):
        plan(QFedAvg())
    plan(FedAvg())
    assert measures(QFedAvg()) and not measures(FedAvg())
    rows = Rows(torch.zeros(4, 30), torch.zeros(4).long())
    with pytest.raises(Refused, match="rule qfedavg reports exact numbers made of rows"):
        Trainer(recipe(), Training(lr=0.1, steps=1), RECORD).train(
            task(), rows, {}, seed=0, public_rows=4
        )


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"qfedavg.q -1.0: must be 0 or more"):
        QFedAvg(-1.0)
    with pytest.raises(ConfigError, match=r"qfedavg.server_lr 0.0: must be above 0"):
        QFedAvg(server_lr=0.0)


def test_a_model_s_counters_are_not_scaled() -> None:
    delta = Params({"w": torch.ones(2), "n": torch.tensor(7)})
    told, _ = Fair().finish(
        Brief(delta, "qfedavg", {"q": 1.0}), {}, delta, {"lr": 0.5, "loss": 3.0}
    )
    assert int(told["delta"]["n"]) == 7
    assert told["delta"]["w"].tolist() == [3.0, 3.0]
