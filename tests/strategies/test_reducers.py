"""The weighted mean has the same bits whatever the order, and refuses what it cannot hold."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedml.errors import MalformedUpdate
from fedml.params import Params
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.tasks import Stack, Update
from fedml.stacked import Stacked
from fedml.strategies import Aggregate, WeightedMean, reducers
from fedml.strategies.base import add_stack


def update(
    delta: Params, weight: float, site: str = "bern", metrics: dict[str, float] | None = None
) -> Update:
    return Update(TaskId("t"), 1, SiteId(site), delta, weight, metrics=metrics or {})


def reduce(updates: list[Update]) -> Aggregate:
    reduction = WeightedMean().start()
    for one in updates:
        reduction.add(one)
    return reduction.result()


def vector(*values: float, dtype: torch.dtype = torch.float32) -> Params:
    return Params({"w": torch.tensor(values, dtype=dtype)})


values = st.floats(-2e4, 2e4, width=32) | st.floats(-(2.0**-100), 2.0**-100, width=32)
weights = st.floats(1e-2, 1e4)
cohorts = st.lists(
    st.tuples(st.lists(values, min_size=3, max_size=3), weights, st.floats(-1e300, 1e300)),
    min_size=1,
    max_size=8,
)


@given(cohorts, st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(
    cohort: list[tuple[list[float], float, float]], shuffler: random.Random
) -> None:
    updates = [update(vector(*v), w, f"s{k}", {"loss": m}) for k, (v, w, m) in enumerate(cohort)]
    shuffled = list(updates)
    shuffler.shuffle(shuffled)
    first, second = reduce(updates), reduce(shuffled)
    assert first.delta.digest() == second.delta.digest()
    assert (first.weight, first.count) == (second.weight, second.count)
    assert repr(first.metrics) == repr(second.metrics)


def test_an_order_that_plain_addition_would_notice_is_not_noticed() -> None:
    updates = [update(vector(v), 1.0) for v in (1e8, 1e-3, -1e8)]
    assert float(reduce(updates).delta["w"]) == pytest.approx(1e-3 / 3, rel=1e-6)
    assert reduce(updates).delta == reduce(updates[::-1]).delta


@given(cohorts)
def test_the_mean_is_the_exact_mean_to_half_a_grid_step_per_update(
    cohort: list[tuple[list[float], float, float]],
) -> None:
    got = reduce([update(vector(*v, dtype=torch.float64), w) for v, w, _ in cohort]).delta["w"]
    total = sum((Fraction(w) for _, w, _ in cohort), Fraction(0))
    for k in range(3):
        terms = [Fraction(v[k]) * Fraction(w) for v, w, _ in cohort]
        exact = sum(terms, Fraction(0)) / total
        slack = len(cohort) * Fraction(1, 2**33) / total + abs(exact) / 2**50
        rounding = sum(map(abs, terms), Fraction(0)) / total / 2**50
        assert abs(Fraction(float(got[k])) - exact) <= slack + rounding


def test_chunks_cover_every_element(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reducers, "_CHUNK", 7)
    monkeypatch.setattr(reducers, "_TILE", 7)
    delta = Params({"w": torch.arange(100.0), "v": torch.arange(33.0, dtype=torch.float64)})
    got = reduce([update(delta, 2.0), update(delta, 3.0)]).delta
    assert torch.equal(got["w"], delta["w"])
    assert torch.equal(got["v"], delta["v"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("also_here", [False, True])
def test_a_sum_on_an_accelerator_has_the_bits_of_one_by_one(
    dtype: torch.dtype, also_here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `also_here` a site of the cohort was trained by itself, so both sums come together."""
    monkeypatch.setattr(reducers, "_is_near", lambda values: False)
    monkeypatch.setattr(reducers, "_CHUNK_THERE", 7)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(5, 50, dtype=torch.float64, generator=generator).to(dtype)
    updates = [update(Params({"w": row}), 1.0 + k / 3, f"s{k}") for k, row in enumerate(rows)]
    some = updates[1:] if also_here else updates
    stack = Stack(
        1, tuple(one.site for one in some), tuple(one.task for one in some),
        Stacked([one.delta for one in some]), tuple(one.weight for one in some),
    )  # fmt: skip
    reduction = WeightedMean().start()
    assert not add_stack(reduction, stack)
    if also_here:
        reduction.add(updates[0])
    assert reduction.result().delta.digest() == reduce(updates).delta.digest()


def test_an_update_is_left_as_it_was() -> None:
    delta = Params({"w": torch.ones(3, dtype=torch.float64), "n": torch.tensor([3])})
    before = delta.digest()
    reduce([update(delta, 5.0), update(delta, 7.0)])
    assert delta.digest() == before


def test_integers_advance_by_their_maximum() -> None:
    def with_counter(steps: int, flag: bool) -> Params:
        tensors = {"w": torch.zeros(1), "n": torch.tensor([steps]), "b": torch.tensor([flag])}
        return Params(tensors)

    updates = [update(with_counter(3, False), 100.0), update(with_counter(9, True), 1.0)]
    mean = reduce(updates).delta
    assert mean["n"].tolist() == [9]
    assert mean["b"].tolist() == [True]
    assert mean == reduce(updates[::-1]).delta


def test_slots_are_averaged_like_the_delta() -> None:
    updates = [
        Update(TaskId("t"), 1, SiteId("s"), vector(0.0), w, slots={"control": vector(v)})
        for v, w in ((1.0, 1.0), (4.0, 2.0))
    ]
    assert reduce(updates).slots["control"]["w"].tolist() == [3.0]


def test_metrics_are_weighted_means_over_those_who_have_them() -> None:
    updates = [
        update(vector(0.0), 1.0, metrics={"loss": 2.0, "only": 7.0}),
        update(vector(0.0), 3.0, metrics={"loss": 6.0, "broken": float("nan")}),
    ]
    assert reduce(updates).metrics == {"loss": 5.0, "only": 7.0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e9])
def test_a_value_outside_the_grid_is_refused_and_leaves_the_sum_alone(bad: float) -> None:
    reduction = WeightedMean().start()
    reduction.add(update(vector(1.0, 2.0), 1.0))
    with pytest.raises(MalformedUpdate, match="do not fit the sum"):
        reduction.add(update(vector(5.0, bad), 1.0))
    assert reduction.result().delta["w"].tolist() == [1.0, 2.0]


def test_updates_that_overflow_only_together_fail_the_round_in_any_order() -> None:
    updates = [update(vector(2e9), 1.0), update(vector(2e9), 1.0), update(vector(-2e9), 1.0)]
    for order in (updates, updates[::-1]):
        with pytest.raises(MalformedUpdate, match="the updates add up to 6e"):
            reduce(order)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e308])
def test_a_weight_must_be_a_sensible_number(weight: float) -> None:
    with pytest.raises(MalformedUpdate, match="weight"):
        reduce([update(vector(1.0), weight)])


def test_weights_too_small_for_the_grid_are_refused_together() -> None:
    with pytest.raises(MalformedUpdate, match="weights add up to 2e-09"):
        reduce([update(vector(1.0), 1e-9), update(vector(1.0), 1e-9)])


def test_metrics_that_would_overflow_are_left_out() -> None:
    metrics = [{"loss": 1.7e308}, {"loss": -1.7e308}, {"loss": 2.0}]
    assert reduce([update(vector(0.0), 9.0, metrics=m) for m in metrics]).metrics == {"loss": 2.0}


def test_nothing_has_no_mean() -> None:
    with pytest.raises(MalformedUpdate, match="no update"):
        reduce([])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_keeps_its_dtype(dtype: torch.dtype) -> None:
    mean = reduce([update(vector(0.5, -2.0, dtype=dtype), 3.0)]).delta["w"]
    assert mean.dtype == dtype
    assert mean.tolist() == [0.5, -2.0]
