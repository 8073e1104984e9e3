"""Promises that every reducer keeps."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from fedml.errors import MalformedUpdate
from fedml.params import Params
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.tasks import Update
from fedml.strategies import Aggregate, Reducer, WeightedMean

REDUCERS: list[Reducer] = [WeightedMean()]


def params(seed: int) -> Params:
    rng = torch.Generator().manual_seed(seed)
    return Params({"w": torch.randn(7, 3, generator=rng), "n": torch.tensor(seed)})


def update(seed: int, weight: float | None = None) -> Update:
    site = SiteId(f"site-{seed}")
    own = weight if weight is not None else 1.0 + seed
    return Update(TaskId(f"run.1.1.{site}"), 1, site, params(seed), own, {}, {"loss": 0.1 * seed})


def reduced(reducer: Reducer, updates: list[Update]) -> Aggregate:
    reduction = reducer.start()
    for each in updates:
        reduction.add(each)
    return reduction.result()


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_any_order_of_arrival_gives_the_same_bits(reducer: Reducer) -> None:
    updates = [update(seed) for seed in range(4)]
    first = reduced(reducer, updates)
    for order in itertools.permutations(updates):
        again = reduced(reducer, list(order))
        assert again.delta.digest() == first.delta.digest()
        assert (again.weight, again.count, again.metrics) == (
            first.weight,
            first.count,
            first.metrics,
        )


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_one_update_alone_is_its_own_aggregate(reducer: Reducer) -> None:
    alone = update(3)
    total = reduced(reducer, [alone])
    torch.testing.assert_close(total.delta["w"], alone.delta["w"], rtol=0, atol=2.0**-32)
    assert (total.count, total.weight) == (1, alone.weight)


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_updates_are_left_as_they_were_and_reductions_do_not_meet(reducer: Reducer) -> None:
    updates = [update(seed) for seed in range(3)]
    before = [each.delta.digest() for each in updates]
    both = reducer.start(), reducer.start()
    for each in updates:
        both[0].add(each)
    both[1].add(updates[0])
    assert both[1].result().count == 1
    assert both[0].result().count == 3
    assert [each.delta.digest() for each in updates] == before


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_refused_update_leaves_the_reduction_as_it_was(reducer: Reducer, weight: float) -> None:
    reduction = reducer.start()
    reduction.add(update(1))
    with pytest.raises(MalformedUpdate, match="weight"):
        reduction.add(update(2, weight))
    assert reduction.result().delta.digest() == reduced(reducer, [update(1)]).delta.digest()


@pytest.mark.parametrize("reducer", REDUCERS, ids=repr)
def test_a_linear_reducer_needs_only_the_sum(reducer: Reducer) -> None:
    if not reducer.linear:
        pytest.fail("a non-linear reducer needs a contract of its own here")
    one, two = update(1, 1.0), update(2, 3.0)
    total = reduced(reducer, [one, two])
    mean = (one.delta["w"].double() + 3 * two.delta["w"].double()) / 4
    torch.testing.assert_close(total.delta["w"].double(), mean, rtol=1e-6, atol=1e-8)


def test_metrics_that_are_no_numbers_are_left_out() -> None:
    odd = replace(update(1), metrics={"loss": math.nan})
    assert "loss" in reduced(WeightedMean(), [odd, update(2)]).metrics
    assert "loss" not in reduced(WeightedMean(), [odd]).metrics
