"""The filter: whatever is granted, in whatever order and however chosen, keeps the limit."""

from __future__ import annotations

import math

import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import rdp_privacy_accountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml.privacy import accounting, renyi
from fedml.privacy.accounting import PLANNED, Event, Pure, SampledGaussian
from fedml.privacy.renyi import Filter, Pledge
from fedml.protocol.messages import Privacy, RunId, TaskId

RUN, OTHER = RunId("run-1"), RunId("run-2")
DELTA = 1e-5


@pytest.mark.parametrize(
    ("sampling", "noise"), [(1.0, 3.0), (0.3, 2.0), (1 / 64, 1.0), (0.01, 5.0)]
)
@pytest.mark.parametrize("order", [2, 5, 16, 64])
def test_a_sampled_gaussian_s_divergence_is_google_s(
    sampling: float, noise: float, order: int
) -> None:
    oracle = rdp_privacy_accountant.RdpAccountant([order])
    oracle.compose(dp_event.PoissonSampledDpEvent(sampling, dp_event.GaussianDpEvent(noise)), 7)
    ours = renyi.divergence(SampledGaussian(sampling, noise, 7), order)
    assert ours == pytest.approx(float(oracle._rdp[0]), rel=1e-6)


@pytest.mark.parametrize("cost", [0.01, 0.5, 3.0, 800.0])
def test_a_pure_event_s_divergence_is_that_of_randomised_response(cost: float) -> None:
    """By its definition, in plain numbers; never above the cost, and near it at a high order."""
    if cost < 100:
        yes = math.exp(cost) / (1 + math.exp(cost))
        moment = yes**5 * (1 - yes) ** -4 + (1 - yes) ** 5 * yes**-4
        assert renyi.divergence(Pure(cost), 5) == pytest.approx(math.log(moment) / 4, rel=1e-9)
    assert 0 < renyi.divergence(Pure(cost, 3), 2) <= 3 * cost
    assert renyi.divergence(Pure(cost), 4000) > 0.9 * min(cost, 2000 * cost**2)


@given(st.floats(0.01, 100), st.floats(1e-12, 0.1))
def test_the_shares_of_delta_add_up_to_it(limit: float, delta: float) -> None:
    shares = renyi.orders(limit, delta)
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-12)
    assert all(order >= 2 for order in shares)


@pytest.mark.parametrize(
    ("event", "most"),
    [
        (SampledGaussian(1 / 3, 3.0, 60), 1.13),
        (SampledGaussian(1 / 64, 1.0, 3000), 1.14),
        (SampledGaussian(0.0025, 0.8, 10_000), 1.35),
        (SampledGaussian(1.0, 10.0, 50), 1.12),
        (SampledGaussian(0.01, 3.0, 3000), 1.13),
    ],
)
def test_what_not_knowing_the_future_costs(event: SampledGaussian, most: float) -> None:
    """The filter asks more than privacy loss distributions do, never less."""
    fixed = accounting.epsilon([event], DELTA)
    asked = renyi.epsilon([event], fixed, DELTA)
    assert fixed < asked < most * fixed


def test_pure_events_add_up_while_that_is_less() -> None:
    assert renyi.epsilon([Pure(2.9)], 3.0, DELTA) == 2.9
    assert renyi.epsilon([Pure(0.01)] * 400, 3.0, DELTA) < 2.0
    assert renyi.epsilon([], 3.0, DELTA) == 0.0


events = st.one_of(
    st.builds(
        SampledGaussian,
        sampling=st.sampled_from([0.05, 0.5, 1.0]),
        noise=st.sampled_from([1.0, 3.0, 8.0]),
        steps=st.sampled_from([1, 5, 20]),
    ),
    st.builds(Pure, epsilon=st.sampled_from([0.1, 0.5, 1.0])),
)
asks = st.tuples(
    events, st.sampled_from([RUN, OTHER]), st.integers(1, 6), st.sampled_from(["answer", "void"])
)


@given(st.lists(asks, min_size=1, max_size=20), st.sampled_from([1.0, 3.0]))
@settings(max_examples=60, deadline=None)
def test_whatever_is_granted_keeps_the_limit(
    history: list[tuple[Event, RunId, int, str]], limit: float
) -> None:
    granted: list[Event] = []
    book = Filter()
    for number, (event, run, planned, fate) in enumerate(history):
        pledge, task = Pledge(run, event, planned), TaskId(f"task-{number}")
        if not book.fits(pledge, limit, DELTA):
            continue
        book.hold(task, pledge)
        if fate == "void":
            book.give_back(task)
        else:
            book.answer()
            granted.append(event)
        assert accounting.epsilon(granted, DELTA) <= limit + 1e-6


def whole(limit: float, rounds: int) -> SampledGaussian:
    """Return one of `rounds` events that together take the whole limit."""
    asked = Privacy("record", limit, DELTA, rounds=rounds)
    return SampledGaussian(0.2, accounting.noise_multiplier(asked, 0.2, 10), 10)


def test_a_plan_for_the_whole_limit_is_carried_out_to_its_last_round() -> None:
    book, event = Filter(), whole(3.0, 10)
    for number in range(10):
        assert book.fits(Pledge(RUN, event, 10), 3.0, DELTA)
        book.hold(TaskId(f"t{number}"), Pledge(RUN, event, 10))
        book.answer()
    assert not book.fits(Pledge(RUN, event, 10), 3.0, DELTA)
    assert not book.fits(Pledge(OTHER, Pure(1e-6)), 3.0, DELTA)


def test_a_plan_that_is_made_up_after_an_answer_is_no_plan() -> None:
    book, event = Filter(), whole(3.0, 10)
    book.hold(TaskId("t"), Pledge(OTHER, Pure(0.001)))
    book.answer()
    granted = 0
    while book.fits(Pledge(RUN, event, 10), 3.0, DELTA):
        book.hold(TaskId(f"t{granted}"), Pledge(RUN, event, 10))
        granted += 1
    assert 5 < granted < 10


def test_what_comes_beside_a_plan_goes_by_the_rest_of_delta() -> None:
    """A run that broke off leaves room, but not for what only fits with all of delta."""
    book, event = Filter(), whole(3.0, 10)
    for number in range(4):
        book.hold(TaskId(f"t{number}"), Pledge(RUN, event, 10))
        book.answer()
    used, other = [event] * 4, Pledge(OTHER, event, 1)
    assert book.fits(other, 3.0, DELTA)
    rest = (1 - PLANNED) * DELTA
    assert book.need(other, 3.0, DELTA) == renyi.epsilon([*used, event], 3.0, rest)
    book.hold(TaskId("beside"), other)
    granted = 5
    while book.fits(Pledge(RUN, event, 10), 3.0, DELTA):  # no longer alone: its plan is no proof
        book.hold(TaskId(f"t{granted}"), Pledge(RUN, event, 10))
        granted += 1
    assert granted < 10


def test_two_plans_that_do_not_fit_together_do_not_both_take_the_limit() -> None:
    book, event = Filter(), whole(3.0, 10)
    book.hold(TaskId("first"), Pledge(RUN, event, 10))
    needed = book.need(Pledge(OTHER, event, 10), 3.0, DELTA)
    assert needed == renyi.epsilon([event] * 2, 3.0, (1 - PLANNED) * DELTA)
