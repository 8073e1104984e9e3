"""Every algorithm against its paper, in float64, on a quadratic that sites solve by SGD."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.tasks import Update
from fedml.strategies import (
    RULES,
    Aggregate,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Strategy,
)

Vector = NDArray[np.float64]
CENTRES = np.array([[1.0, -2.0, 0.5], [3.0, 4.0, -1.0], [-5.0, 0.25, 2.0]])
CURVES = np.array([[1.0, 0.5, 2.0], [0.3, 1.5, 1.0], [0.7, 0.2, 0.4]])
SIZES = np.array([10.0, 30.0, 5.0])
LR, STEPS, ROUNDS = 0.1, 4, 12


def params(values: Vector) -> Params:
    return Params({"w": torch.tensor(values, dtype=torch.float64)})


def ours(strategy: Strategy) -> Vector:
    """Run the strategy and its local rule; site k minimises sum(curve_k (w - centre_k)^2) / 2."""
    state = strategy.start(params(np.zeros(3)))
    for number in range(1, ROUNDS + 1):
        brief, reduction = strategy.brief(state), strategy.reducer.start()
        rule = RULES[brief.rule]
        for k, (centre, curve) in enumerate(zip(CENTRES, CURVES, strict=True)):
            here = brief.params
            for _ in range(STEPS):
                grads = params(curve * (here["w"].numpy() - centre))
                here = here - rule.gradient(brief, {}, here, grads) * LR
            site = SiteId(f"site-{k}")
            delta = here - brief.params
            reduction.add(Update(TaskId(site), number, site, delta, float(SIZES[k])))
        state = strategy.advance(state, reduction.result())
    assert state.step == ROUNDS
    return np.asarray(state.params["w"].numpy())


def mean_delta(w: Vector, mu: float = 0.0) -> Vector:
    """The paper's side: local SGD, then sum_k (n_k / n) (w_k - w)."""
    total = np.zeros(3)
    for centre, curve, size in zip(CENTRES, CURVES, SIZES, strict=True):
        here = w.copy()
        for _ in range(STEPS):
            here = here - LR * (curve * (here - centre) + mu * (here - w))
        total += size / SIZES.sum() * (here - w)
    return total


def adaptive(name: str, lr: float, beta1: float, beta2: float, tau: float) -> Vector:
    """Reddi et al. 2021, algorithm 2, written out."""
    w, m, v = np.zeros(3), np.zeros(3), np.full(3, tau**2)
    for _ in range(ROUNDS):
        delta = mean_delta(w)
        m = beta1 * m + (1 - beta1) * delta
        square = delta**2
        if name == "adagrad":
            v = v + square
        elif name == "yogi":
            v = v - (1 - beta2) * square * np.sign(v - square)
        else:
            v = beta2 * v + (1 - beta2) * square
        w = w + lr * m / (np.sqrt(v) + tau)
    return w


def test_fedavg_is_algorithm_1_of_mcmahan_2017() -> None:
    w = np.zeros(3)
    for _ in range(ROUNDS):
        w = w + 0.7 * mean_delta(w)
    np.testing.assert_allclose(ours(FedAvg(0.7)), w, atol=1e-8)


@pytest.mark.parametrize("start", [1, 5, ROUNDS])
def test_tail_averaging_is_the_mean_of_the_models_from_a_round_on(start: int) -> None:
    """Rakhlin et al. 2012, section 5; what sites go on from is the last model, as ever."""
    w, models = np.zeros(3), []
    for _ in range(ROUNDS):
        w = w + 0.7 * mean_delta(w)
        models.append(w)
    mean = np.mean(models[start - 1 :], axis=0)
    np.testing.assert_allclose(ours(FedAvg(0.7, average_from=start)), mean, atol=1e-8)
    never = ours(FedAvg(0.7, average_from=ROUNDS + 1))
    assert never.tobytes() == ours(FedAvg(0.7)).tobytes()


def test_a_mean_of_models_takes_the_last_model_s_integers() -> None:
    strategy = FedAvg(average_from=1)
    state = strategy.start(Params({"w": torch.zeros(2), "seen": torch.tensor(0)}))
    for _ in range(3):
        delta = Params({"w": torch.ones(2), "seen": torch.tensor(5)})
        state = strategy.advance(state, Aggregate(delta, {}, 1.0, 1))
    assert int(state.params["seen"]) == 15 and state.params["w"].tolist() == [2.0, 2.0]
    assert strategy.brief(state).params["w"].tolist() == [3.0, 3.0]


def test_fedprox_is_equation_2_of_li_2020() -> None:
    w = np.zeros(3)
    for _ in range(ROUNDS):
        w = w + mean_delta(w, mu=0.5)
    np.testing.assert_allclose(ours(FedProx(mu=0.5)), w, atol=1e-8)


def test_fedavgm_is_section_4_3_of_hsu_2019() -> None:
    w, m = np.zeros(3), np.zeros(3)
    for _ in range(ROUNDS):
        m = 0.9 * m + mean_delta(w)
        w = w + 0.5 * m
    np.testing.assert_allclose(ours(FedAvgM(0.5, beta=0.9)), w, atol=1e-8)


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (FedAdagrad(0.3, beta1=0.2, tau=0.01), "adagrad"),
        (FedAdam(0.3, beta1=0.8, tau=0.01, beta2=0.95), "adam"),
        (FedYogi(0.3, beta1=0.8, tau=0.01, beta2=0.95), "yogi"),
    ],
)
def test_fedopt_is_algorithm_2_of_reddi_2021(
    strategy: FedAdagrad | FedAdam | FedYogi, name: str
) -> None:
    beta2 = getattr(strategy, "beta2", 0.0)
    theirs = adaptive(name, 0.3, strategy.beta1, beta2, 0.01)
    np.testing.assert_allclose(ours(strategy), theirs, atol=1e-7)


def test_the_three_adaptive_rules_differ() -> None:
    ends = [tuple(ours(kind(0.3))) for kind in (FedAdagrad, FedAdam, FedYogi)]
    assert len(set(ends)) == 3


def test_fedprox_without_pull_is_fedavg_to_the_bit() -> None:
    assert ours(FedProx(mu=0.0)).tobytes() == ours(FedAvg()).tobytes()


def test_fedavgm_without_momentum_is_fedavg_to_the_bit() -> None:
    assert ours(FedAvgM(beta=0.0)).tobytes() == ours(FedAvg()).tobytes()


def test_one_site_and_one_step_is_gradient_descent() -> None:
    w = params(np.array([2.0, -1.0, 0.0]))
    total = Aggregate(w * -LR, {}, 10.0, 1)  # one step down the gradient of |w|^2 / 2
    assert FedAvg().advance(FedAvg().start(w), total).params == w + w * -LR


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: FedAvg(0.0), "fedavg.server_lr 0.0"),
        (lambda: FedAvg(math.nan), "fedavg.server_lr nan"),
        (lambda: FedAvg(average_from=-1), "fedavg.average_from -1"),
        (lambda: FedProx(mu=-1.0), "fedprox.mu -1.0"),
        (lambda: FedAvgM(beta=1.0), "fedavgm.beta 1.0"),
        (lambda: FedAdam(tau=0.0), "fedadam.tau 0.0"),
        (lambda: FedAdam(beta2=1.5), "fedadam.beta2 1.5"),
        (lambda: FedYogi(beta1=-0.1), "fedyogi.beta1 -0.1"),
        (lambda: FedAdagrad(math.inf), "fedadagrad.server_lr inf"),
    ],
)
def test_a_bad_setting_is_refused_at_birth(make: type[Strategy], setting: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        make()
