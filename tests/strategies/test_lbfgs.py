"""Federated L-BFGS follows its paper's formula and finds the pooled maximum likelihood."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedml.errors import ConfigError, Contradiction
from fedml.params import Params, decode, encode
from fedml.protocol.messages import RunId, SiteId, TaskId
from fedml.protocol.tasks import Update
from fedml.rounds import Run
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.base import Holding, Memory
from fedml.simulation.executors.inline import Inline
from fedml.strategies import LBFGS, STATISTICS, Sample, ServerState
from simulations.heart_disease.data import SOURCES, Hospitals
from simulations.heart_disease.figures import maximum_likelihood
from simulations.heart_disease.recipe import HeartDisease64
from tests.simulations.data import FOLDER, needs
from tests.strategies import quadratics
from tests.strategies.quadratics import Vector
from tests.strategies.test_newton import RECORD, made_up, plan, pooled

Loss = Callable[[Tensor], Tensor]
SHARES, NOTHING = torch.tensor(quadratics.SHARES), torch.zeros(0)


def sample_of(loss: Loss) -> Sample:
    return Sample(NOTHING, NOTHING, lambda params: params["w"], lambda w, _: loss(w))


def moved(strategy: LBFGS, state: ServerState, sites: Mapping[int, Loss]) -> ServerState:
    """Return the state after a round over sites with these losses of "w"."""
    brief, reduction = strategy.brief(state), strategy.reducer.start()
    for site, loss in sites.items():
        delta, slots = STATISTICS["lbfgs"].measure(brief, sample_of(loss))
        who = (TaskId(f"t{site}"), state.step + 1, SiteId(f"s{site}"))
        reduction.add(Update(*who, delta, float(quadratics.SIZES[site]), slots))
    return strategy.advance(state, reduction.result())


def quadratic(site: int, times: float = 1.0) -> Loss:
    curve, centre = (torch.tensor(a[site]) for a in (quadratics.CURVES, quadratics.CENTRES))
    return lambda w: times * 0.5 * (curve * (w - centre).square()).sum()


def rugged(site: int) -> Loss:
    """No quadratic, and steep enough to be overshot."""
    centre = torch.tensor(quadratics.CENTRES[site])
    return lambda w: (w - centre).square().add(1).log().sum() + 0.1 * (w - centre).pow(4).sum()


def all_sites(loss: Callable[[int], Loss]) -> Mapping[int, Loss]:
    return {site: loss(site) for site in range(3)}


def dense(pairs: list[tuple[Vector, Vector]], size: int) -> Vector:
    """The inverse Hessian of BFGS, updated pair by pair from the scaled identity."""
    s, y = pairs[-1]
    h = np.eye(size) * (s @ y) / (y @ y)
    for s, y in pairs:
        v = np.eye(size) - np.outer(y, s) / (y @ s)
        h = v.T @ h @ v + np.outer(s, s) / (y @ s)
    return np.asarray(h)


def gradient(w: Vector, loss: Callable[[int], Loss]) -> Vector:
    at = torch.tensor(w).requires_grad_()
    total = sum(share * loss(k)(at) for k, share in enumerate(SHARES))
    assert isinstance(total, Tensor)
    return np.asarray(torch.autograd.grad(total, at)[0].numpy())


@pytest.mark.parametrize("memory", [2, 3, 7])
def test_each_step_is_the_paper_s(memory: int) -> None:
    """Points that were taken are told by the base; a step from them is -H g, dense."""
    strategy, sites = LBFGS(memory), all_sites(rugged)
    state = strategy.start(quadratics.params(np.array([2.0, 9.0, -6.0])))
    pairs, points, looked = list[tuple[Vector, Vector]](), list[Vector](), 0
    for _ in range(25):
        state = moved(strategy, state, sites)
        base = state.slots["base"]["w"].numpy()
        if points and np.array_equal(base, points[-1]):
            continue  # that step was not taken
        points.append(base)
        g = gradient(base, rugged)
        if len(points) > 1:
            change = g - gradient(points[-2], rugged)
            if (base - points[-2]) @ change > 0:
                pairs = [*pairs, (base - points[-2], change)][-memory:]
        if pairs and np.linalg.norm(g) > 1e-4:
            wanted, looked = -dense(pairs, 3) @ g, looked + 1
            got = state.params["w"].numpy() - base
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-7)
    assert looked > 5
    assert np.linalg.norm(gradient(points[-1], rugged)) < 1e-6


def test_steps_that_are_too_long_are_shortened_and_no_point_taken_is_worse() -> None:
    strategy, sites = LBFGS(), all_sites(lambda site: quadratic(site, 50.0))
    state = strategy.start(quadratics.params(quadratics.OPTIMUM + 0.01))  # a step of 1/2 is far
    bases, left = list[Vector](), 0
    for _ in range(20):
        tried = state.params
        state = moved(strategy, state, sites)
        left += state.slots["base"] != tried
        bases.append(state.slots["base"]["w"].numpy())
    losses = [sum(quadratics.SHARES[k] * quadratics.loss(k, w) for k in range(3)) for w in bases]
    assert all(later <= earlier + 1e-11 for earlier, later in itertools.pairwise(losses))
    assert left > 1
    np.testing.assert_allclose(bases[-1], quadratics.OPTIMUM, atol=1e-9)


@pytest.mark.parametrize("beyond", [torch.inf, torch.nan])
def test_a_loss_that_is_no_number_at_one_site_is_a_step_too_far(beyond: float) -> None:
    """Though the other site would have all go there."""

    def walled(w: Tensor) -> Tensor:
        return 100 * (w - 0.01).square().sum() + torch.where(w.abs() > 0.1, beyond, 0.0).sum()

    def far(w: Tensor) -> Tensor:
        return 0.01 * (w - 5).square().sum()

    strategy, between = LBFGS(), (10 * 100 * 0.01 + 30 * 0.01 * 5) / (10 * 100 + 30 * 0.01)
    state = strategy.start(quadratics.params(np.full(3, -0.09)))
    for _ in range(40):
        state = moved(strategy, state, {0: walled, 1: far})
        assert state.params.is_finite()
    np.testing.assert_allclose(state.slots["base"]["w"].numpy(), between, atol=1e-6)


def test_read_back_from_a_file_it_goes_on_to_the_same_bits() -> None:
    strategy, sites = LBFGS(3), all_sites(rugged)
    state = strategy.start(quadratics.params(np.array([2.0, 9.0, -6.0])))
    for _ in range(6):
        state = moved(strategy, state, sites)
    parts = decode(b"".join(encode({"": state.params, **state.slots})))
    again = ServerState(parts.pop(""), parts, state.step)
    for _ in range(6):
        state, again = moved(strategy, state, sites), moved(strategy, again, sites)
    assert state == again


def fitted(holdings: Mapping[SiteId, Holding]) -> Tensor:
    """Return weights and intercept after forty rounds of the production run."""
    a_plan, recipe = replace(plan(LBFGS()), rounds=40), HeartDisease64()
    run = Run.begin(RunId("r"), a_plan, Params(recipe.build().state_dict()))
    engine = Engine(run, Inline(a_plan, recipe, holdings, Memory()), statuses(a_plan, holdings))
    outcome = engine.play()
    assert outcome.candidate is not None, outcome.end.detail
    found = outcome.candidate.params
    return torch.cat([found["weight"].reshape(-1), found["bias"]])


def test_made_up_sites_find_the_pooled_maximum_likelihood() -> None:
    sites = made_up()
    assert float((fitted(sites) - maximum_likelihood(pooled(sites))).abs().max()) < 1e-6


@needs(SOURCES["va"].place)
def test_four_hospitals_find_the_pooled_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDML_DATA", str(FOLDER))
    sites = Hospitals().deal(HeartDisease64(), None)
    assert float((fitted(sites) - maximum_likelihood(pooled(sites))).abs().max()) < 1e-6


def test_privacy_refuses_it_and_so_do_settings_and_models_that_are_none() -> None:
    with pytest.raises(Contradiction, match=r"LBFGS with record privacy: .*exact"):
        plan(LBFGS(), RECORD)
    for bad in (0, 2.5, 1000):
        with pytest.raises(ConfigError, match=r"lbfgs\.memory"):
            LBFGS(bad)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a model with floating parameters"):
        LBFGS().start(Params({"n": torch.tensor(3)}))
