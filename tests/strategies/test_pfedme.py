"""pFedMe against its paper, where it comes to rest, and its own models at sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from fedml.errors import ConfigError
from fedml.learning.evaluation import evaluate
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Slots, Task
from fedml.simulation.executors.base import MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.processes import Processes
from fedml.strategies import FedAvg, PFedMe, Strategy
from tests.simulation.worlds import engine, holdings, plan, recipe, start
from tests.strategies.quadratics import (
    CENTRES,
    CURVES,
    SHARES,
    Quadratics,
    Vector,
    gradient,
)


def paper(rounds: int, of: PFedMe, lr: float, moves: int) -> tuple[Vector, Vector]:
    """Algorithm 1 with gradient descent within: the global model, and those of three sites."""
    w, theta = np.zeros(3), np.zeros((3, 3))
    for _ in range(rounds):
        ends = np.zeros((3, 3))
        for k in range(3):
            local = w.copy()
            for _ in range(moves):
                for _ in range(of.inner):
                    pull = of.lam * (theta[k] - local)
                    theta[k] = theta[k] - lr * (gradient(k, theta[k]) + pull)
                local = local - of.eta * of.lam * (local - theta[k])
            ends[k] = local
        w = (1 - of.beta) * w + of.beta * SHARES @ ends
    return w, theta


def thetas(federation: Quadratics) -> Vector:
    return np.array([federation.memory[k]["theta"]["w"].numpy() for k in range(3)])


@pytest.mark.parametrize(
    "strategy", [PFedMe(), PFedMe(2.0, 0.3, inner=3, beta=0.7), PFedMe(0.5, 0.4, inner=1, beta=1.5)]
)
def test_it_is_algorithm_1_of_dinh_2020(strategy: PFedMe) -> None:
    moves = 3
    federation = Quadratics(strategy, steps=(moves * strategy.inner,) * 3)
    w, theta = paper(6, strategy, 0.1, moves)
    np.testing.assert_allclose(federation.play(6), w, atol=1e-7)
    np.testing.assert_allclose(thetas(federation), theta, atol=1e-7)


def test_it_comes_to_rest_where_the_moreau_envelopes_have_their_minimum() -> None:
    lam = 2.0
    federation = Quadratics(PFedMe(lam, 0.5, inner=8), lr=0.25, steps=(8, 8, 8))
    w = federation.play(60)
    bent = CURVES * lam / (CURVES + lam)  # the curve of an envelope; its centre is the same
    np.testing.assert_allclose(w, (SHARES @ (bent * CENTRES)) / (SHARES @ bent), atol=1e-5)
    rest = (CURVES * CENTRES + lam * w) / (CURVES + lam)
    np.testing.assert_allclose(thetas(federation), rest, atol=1e-5)


def test_steps_left_over_move_the_local_copy_once_more() -> None:
    strategy = PFedMe(1.0, 0.5, inner=4)
    over, even = (Quadratics(strategy, steps=(n,) * 3) for n in (6, 4))
    short = Quadratics(replace(strategy, inner=6), steps=(6,) * 3)  # 2 of 4 are an end too
    assert np.abs(over.play(1) - even.play(1)).min() > 1e-3
    assert np.abs(over.w - short.play(1)).min() > 1e-3
    near, theta = np.zeros((3, 3)), np.zeros((3, 3))
    for k in range(3):
        for steps in (4, 2):
            for _ in range(steps):
                theta[k] -= 0.1 * (gradient(k, theta[k]) + (theta[k] - near[k]))
            near[k] -= 0.5 * (near[k] - theta[k])
    np.testing.assert_allclose(over.w, SHARES @ near, atol=1e-8)


def test_one_step_that_is_followed_all_the_way_is_fedavg() -> None:
    ours = Quadratics(PFedMe(1.0, 1.0, inner=1), steps=(1, 1, 1))
    np.testing.assert_allclose(
        ours.play(1), Quadratics(FedAvg(), steps=(1, 1, 1)).play(1), atol=1e-9
    )


def test_a_restart_in_the_middle_changes_no_bit() -> None:
    whole, parted = Quadratics(PFedMe()), Quadratics(PFedMe())
    parted.play(3)
    parted = parted.restarted()
    np.testing.assert_array_equal(parted.play(4), whole.play(7))
    np.testing.assert_array_equal(thetas(parted), thetas(whole))


def final(strategy: Strategy, make: MakeExecutor) -> tuple[Params, Memory, Mapping[str, float]]:
    memory = Memory()
    a_plan = replace(plan(strategy=strategy), training=Training(lr=0.5, steps=5, batch_size=32))
    candidate = engine(a_plan, make(a_plan, recipe(), holdings(), memory)).play().candidate
    assert candidate is not None
    return candidate.params, memory, candidate.scores


@pytest.mark.parametrize("make", [Inline, Processes])
def test_the_copy_follows_at_a_site_and_the_own_model_is_scored(make: MakeExecutor) -> None:
    params, memory, scores = final(PFedMe(inner=2), make)
    never, _, _ = final(PFedMe(inner=100), make)  # the copy moves once, at the end
    assert params != never
    right = rows = 0.0
    for site, holding in holdings().items():
        assert memory.slots[site].keys() == {"theta"}
        own = memory.slots[site]["theta"]
        task = Task(TaskId("t"), RunId("r"), 3, site, "evaluate", Brief(own))
        report = evaluate(recipe(), task, holding.held_out, Privacy())
        right, rows = right + report.totals["accuracy"], rows + report.count
    assert scores["accuracy"] == pytest.approx(right / rows, rel=1e-9)


def test_a_site_walks_as_the_paper_says_from_where_its_own_model_was() -> None:
    site, lr, strategy = SiteId("site-0"), 0.5, PFedMe(0.4, 0.6, inner=2)
    rows, theta, near = holdings()[site].train, start().map(lambda b: b + 0.1), start()

    def trained(
        strategy: Strategy, params: Params, memory: Slots, steps: int
    ) -> tuple[Params, Slots]:
        brief = strategy.brief(strategy.start(params))
        task = Task(TaskId("t"), RunId("r"), 1, site, "train", brief)
        trainer = Trainer(recipe(), Training(lr=lr, steps=steps), Privacy())
        update, kept = trainer.train(task, rows, memory, seed=1)
        return update.delta, kept

    delta, kept = trained(strategy, near, {"theta": theta}, 6)
    for _ in range(3):
        for _ in range(2):
            step, _ = trained(FedAvg(), theta, {}, 1)  # minus lr times the plain gradient
            theta = theta + step - (theta - near) * (lr * 0.4)
        near = near - (near - theta) * (0.6 * 0.4)
    assert (kept["theta"] - theta).norm() < 1e-5
    assert (delta - (near - start())).norm() < 1e-5


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"pfedme.lam 0.0: must be above 0"):
        PFedMe(lam=0.0)
    with pytest.raises(ConfigError, match=r"pfedme.inner 0: must be 1 or more steps"):
        PFedMe(inner=0)
    with pytest.raises(ConfigError, match=r"lam 15.0 is above 1: .* lower eta to 0.0666667 or"):
        PFedMe(lam=15.0)
