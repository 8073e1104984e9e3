"""SCAFFOLD against its paper, and where its control variates lead."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.errors import ConfigError
from fedml.strategies import FedAvg, Scaffold
from tests.strategies.quadratics import (
    OPTIMUM,
    SHARES,
    Quadratics,
    Vector,
    descend,
    gradient,
    params,
)


def paper(rounds: list[tuple[int, ...]], server_lr: float, sites: int, steps: int) -> Vector:
    """Algorithm 1 with option II, written out; means weigh rows."""
    w, c, own = np.zeros(3), np.zeros(3), np.zeros((3, 3))
    for cohort in rounds:
        shares = SHARES[[*cohort]] / SHARES[[*cohort]].sum()
        moved, delta = np.zeros(3), np.zeros(3)
        for share, k in zip(shares, cohort, strict=True):
            y = w.copy()
            for _ in range(steps):
                y = y - 0.1 * (gradient(k, y) - own[k] + c)
            new = own[k] - c + (w - y) / (steps * 0.1)
            moved += share * (new - own[k])
            delta += share * (y - w)
            own[k] = new
        w, c = w + server_lr * delta, c + len(cohort) / sites * moved
    return w


def test_it_is_algorithm_1_of_karimireddy_2020() -> None:
    ours = Quadratics(Scaffold(0.8)).play(12)
    np.testing.assert_allclose(ours, paper([(0, 1, 2)] * 12, 0.8, 3, 4), atol=1e-7)


def test_a_part_of_the_sites_moves_c_by_its_part() -> None:
    cohorts = [(0, 1), (2, 0), (1, 2), (0, 1, 2), (2,), (1, 0)]
    federation = Quadratics(Scaffold(sites=3))
    for cohort in cohorts:
        federation.play(1, cohort)
    np.testing.assert_allclose(federation.w, paper(cohorts, 1.0, 3, 4), atol=1e-7)
    assert np.abs(federation.w - paper(cohorts, 1.0, 6, 4)).max() > 0.01


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_it_finds_the_optimum_from_which_fedavg_s_sites_drift(momentum: float) -> None:
    steps = (2, 4, 9)
    found = Quadratics(Scaffold(0.5), 0.05, steps, momentum).play(600)
    np.testing.assert_allclose(found, OPTIMUM, atol=1e-5)
    assert np.abs(Quadratics(FedAvg(), 0.05, steps, momentum).play(600) - OPTIMUM).max() > 0.05


def test_one_site_with_full_batches_does_gradient_descent() -> None:
    ours = Quadratics(Scaffold()).play(5, [1])
    np.testing.assert_allclose(ours, descend(1, np.zeros(3), 0.1, 20), atol=1e-8)


def test_at_the_optimum_with_its_gradients_for_controls_no_site_moves() -> None:
    federation = Quadratics(Scaffold())
    federation.state = federation.strategy.start(params(OPTIMUM))
    federation.memory = {k: {"c": params(gradient(k, OPTIMUM))} for k in range(3)}
    np.testing.assert_allclose(federation.play(3), OPTIMUM, atol=1e-8)


def test_c_is_the_mean_of_the_sites_own() -> None:
    federation = Quadratics(Scaffold())
    federation.play(7)
    own = np.stack([federation.memory[k]["c"]["w"].numpy() for k in range(3)])
    assert np.abs(own).min() > 0.01
    np.testing.assert_allclose(federation.state.slots["c"]["w"].numpy(), SHARES @ own, atol=1e-7)


def test_impossible_numbers_of_sites_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"scaffold.sites -1: give the number of all sites"):
        Scaffold(sites=-1)
