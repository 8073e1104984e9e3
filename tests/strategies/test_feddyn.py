"""FedDyn against its paper, and the one place where it comes to rest."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.errors import ConfigError
from fedml.strategies import FedAvg, FedDyn
from tests.strategies.quadratics import OPTIMUM, SHARES, Quadratics, Vector, gradient, params


def paper(rounds: list[tuple[int, ...]], alpha: float, sites: int) -> Vector:
    """Algorithm 1 with SGD for its local minimisation; means weigh rows."""
    w, h, lam = np.zeros(3), np.zeros(3), np.zeros((3, 3))
    for cohort in rounds:
        shares = SHARES[[*cohort]] / SHARES[[*cohort]].sum()
        ends = np.zeros((len(cohort), 3))
        for place, k in enumerate(cohort):
            x = w.copy()
            for _ in range(4):
                x = x - 0.1 * (gradient(k, x) - lam[k] + alpha * (x - w))
            lam[k] = lam[k] - alpha * (x - w)
            ends[place] = x
        h = h - alpha * len(cohort) / sites * (shares @ (ends - w))
        w = shares @ ends - h / alpha
    return w


def test_it_is_algorithm_1_of_acar_2021() -> None:
    ours = Quadratics(FedDyn(0.3)).play(12)
    np.testing.assert_allclose(ours, paper([(0, 1, 2)] * 12, 0.3, 3), atol=1e-7)


def test_a_part_of_the_sites_moves_h_by_its_part() -> None:
    cohorts = [(0, 1), (2, 0), (1, 2), (0, 1, 2), (2,), (1, 0)]
    federation = Quadratics(FedDyn(0.3, sites=3))
    for cohort in cohorts:
        federation.play(1, cohort)
    np.testing.assert_allclose(federation.w, paper(cohorts, 0.3, 3), atol=1e-7)
    assert np.abs(federation.w - paper(cohorts, 0.3, 6)).max() > 0.01


def test_it_comes_to_rest_at_the_optimum_and_fedavg_beside_it() -> None:
    steps = (2, 4, 9)
    federation = Quadratics(FedDyn(0.5), steps=steps)
    np.testing.assert_allclose(federation.play(800), OPTIMUM, atol=1e-5)
    assert np.abs(Quadratics(FedAvg(), steps=steps).play(800) - OPTIMUM).max() > 0.05
    for k in range(3):  # what each remembers is its own gradient there
        own = federation.memory[k]["lam"]["w"].numpy()
        np.testing.assert_allclose(own, gradient(k, OPTIMUM), atol=1e-4)


def test_at_its_fixed_point_nothing_moves() -> None:
    federation = Quadratics(FedDyn())
    federation.state = federation.strategy.start(params(OPTIMUM))
    federation.memory = {k: {"lam": params(gradient(k, OPTIMUM))} for k in range(3)}
    np.testing.assert_allclose(federation.play(3), OPTIMUM, atol=1e-8)


def test_h_is_the_mean_of_what_sites_remember() -> None:
    federation = Quadratics(FedDyn())
    federation.play(7)
    own = np.stack([federation.memory[k]["lam"]["w"].numpy() for k in range(3)])
    assert np.abs(own).min() > 0.01
    np.testing.assert_allclose(federation.state.slots["h"]["w"].numpy(), SHARES @ own, atol=1e-7)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"feddyn.alpha 0.0: must be above 0"):
        FedDyn(0.0)
    with pytest.raises(ConfigError, match=r"feddyn.sites -1: give the number of all sites"):
        FedDyn(sites=-1)
