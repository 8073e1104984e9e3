"""FedExP against its paper, and how long its steps are."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.errors import ConfigError
from fedml.strategies import FedAvg, FedExP
from tests.strategies.quadratics import (
    OPTIMUM,
    SHARES,
    Quadratics,
    Vector,
    descend,
    gradient,
    params,
)


def deltas(w: Vector) -> Vector:
    return np.stack([descend(k, w, 0.1, 4) - w for k in range(3)])


def step(w: Vector, eps: float) -> float:
    """Equation of algorithm 1, with the shares of rows for 1 / M."""
    found = deltas(w)
    squares = SHARES @ (found**2).sum(1)
    return max(1.0, float(squares / (2 * (np.sum((SHARES @ found) ** 2) + eps))))


@pytest.mark.parametrize("eps", [1e-3, 0.02])
def test_it_is_algorithm_1_of_jhunjhunwala_2023(eps: float) -> None:
    w, steps = np.zeros(3), []
    for _ in range(12):
        steps.append(step(w, eps))
        w = w + steps[-1] * (SHARES @ deltas(w))
    np.testing.assert_allclose(Quadratics(FedExP(eps)).play(12), w, atol=1e-6)
    assert max(steps) > 1.5  # so that the rule was at work


def test_no_step_is_shorter_than_fedavg_s() -> None:
    ours, avg = Quadratics(FedExP(1e6)), Quadratics(FedAvg())
    assert ours.play(6).tobytes() == avg.play(6).tobytes()
    for scale in (0.0, 1.0, 4.0):
        start = params(OPTIMUM + scale)
        for federation in (ours := Quadratics(FedExP()), avg := Quadratics(FedAvg())):
            federation.state = federation.strategy.start(start)
        moved = [np.linalg.norm(one.play(1) - OPTIMUM - scale) for one in (ours, avg)]
        assert moved[0] >= moved[1]


def test_sites_that_agree_make_it_fedavg() -> None:
    ours, avg = Quadratics(FedExP()), Quadratics(FedAvg())
    assert ours.play(4, [1]).tobytes() == avg.play(4, [1]).tobytes()


def test_sites_that_cancel_each_other_lengthen_the_step() -> None:
    ours, avg = Quadratics(FedExP(), steps=(1, 1, 1)), Quadratics(FedAvg(), steps=(1, 1, 1))
    near = OPTIMUM + 0.3  # where the sites' gradients are far larger than their mean
    mean = SHARES @ np.stack([gradient(k, near) for k in range(3)])
    for federation in (ours, avg):
        federation.state = federation.strategy.start(params(near))
    np.testing.assert_allclose(avg.play(1), near - 0.1 * mean, atol=1e-8)
    ratio = np.linalg.norm(ours.play(1) - near) / np.linalg.norm(avg.w - near)
    assert ratio > 5


def test_a_bad_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fedexp.eps 0.0: must be above 0"):
        FedExP(0.0)
