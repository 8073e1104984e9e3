"""FedNova against its paper, and what it does about sites that step more than others."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.strategies import FedAvg, FedNova
from tests.strategies import quadratics
from tests.strategies.quadratics import SHARES, Quadratics, Vector, descend, gradient

UNLIKE = (2, 5, 9)


def paper(rounds: int, server_lr: float, steps: tuple[int, ...], momentum: float = 0.0) -> Vector:
    """Equation 8 written out: d_k = G_k a_k / |a_k|_1, tau_eff = sum_k p_k |a_k|_1."""
    w = np.zeros(3)
    for _ in range(rounds):
        weights, normal = np.zeros(3), np.zeros((3, 3))
        for k in range(3):
            a = [(1 - momentum ** (steps[k] - i)) / (1 - momentum) for i in range(steps[k])]
            here, velocity = w.copy(), np.zeros(3)
            gradients = []
            for _ in range(steps[k]):
                gradients.append(gradient(k, here))
                velocity = momentum * velocity + gradients[-1]
                here = here - 0.1 * velocity
            weights[k] = np.sum(a)
            normal[k] = np.asarray(a) @ np.asarray(gradients) / weights[k]
        w = w - server_lr * (SHARES @ weights) * 0.1 * (SHARES @ normal)
    return w


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_it_is_equation_8_of_wang_2020(momentum: float) -> None:
    ours = Quadratics(FedNova(0.7), steps=UNLIKE, momentum=momentum).play(10)
    np.testing.assert_allclose(ours, paper(10, 0.7, UNLIKE, momentum), atol=1e-7)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_equal_steps_make_it_fedavg(momentum: float) -> None:
    ours = Quadratics(FedNova(), momentum=momentum).play(10)
    np.testing.assert_allclose(ours, Quadratics(FedAvg(), momentum=momentum).play(10), atol=1e-7)


def test_who_steps_more_pulls_no_harder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short paths on alike curves: FedNova ends at the optimum of all rows, FedAvg does not."""
    monkeypatch.setattr(quadratics, "CURVES", np.ones((3, 3)))
    optimum = SHARES @ quadratics.CENTRES
    ours = Quadratics(FedNova(), 1e-3, UNLIKE).play(4000)
    avg = Quadratics(FedAvg(), 1e-3, UNLIKE).play(4000)
    gap, theirs = np.abs(ours - optimum).max(), np.abs(avg - optimum).max()
    assert gap < 0.02
    assert theirs > 10 * gap


def test_one_site_is_its_own_local_training() -> None:
    ours = Quadratics(FedNova()).play(5, [1])
    np.testing.assert_allclose(ours, descend(1, np.zeros(3), 0.1, 20), atol=1e-8)
