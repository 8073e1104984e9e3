"""Promises that every reducer in the table keeps, and every rule."""

import math
import random
from dataclasses import replace

import pytest
import torch

from fedml.errors import MalformedUpdate
from fedml.params import Params
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.tasks import Update
from fedml.strategies import REDUCERS, Aggregate, Reducer, WeightedMean

ALL: list[Reducer] = [
    kind(**({"root": "site-0"} if hasattr(kind(), "root") else {})) for kind in REDUCERS.values()
]


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


@pytest.mark.parametrize("reducer", ALL, ids=repr)
def test_any_order_of_arrival_gives_the_same_bits(reducer: Reducer) -> None:
    updates = [update(seed) for seed in range(max(4, reducer.least))]
    first, order = reduced(reducer, updates), random.Random(1)
    for _ in range(24):
        again = reduced(reducer, order.sample(updates, len(updates)))
        assert again.delta.digest() == first.delta.digest()
        assert replace(again, delta=first.delta) == first


@pytest.mark.parametrize("reducer", ALL, ids=repr)
def test_equal_updates_as_few_as_may_be_are_their_own_aggregate(reducer: Reducer) -> None:
    alone = update(3)
    few = [replace(alone, site=SiteId(f"site-{k}")) for k in range(reducer.least)]
    total = reduced(reducer, few)
    torch.testing.assert_close(total.delta["w"], alone.delta["w"], rtol=1e-6, atol=1e-6)
    assert (total.count, total.weight) == (len(few), alone.weight * len(few))
    with pytest.raises(MalformedUpdate):
        reduced(reducer, few[1:])


@pytest.mark.parametrize("reducer", ALL, ids=repr)
def test_updates_are_left_as_they_were_and_reductions_do_not_meet(reducer: Reducer) -> None:
    updates = [update(seed) for seed in range(reducer.least + 2)]
    before = [each.delta.digest() for each in updates]
    both = reducer.start(), reducer.start()
    for each in updates:
        both[0].add(each)
    for each in updates[:-2]:
        both[1].add(each)
    assert both[1].result().count == reducer.least
    assert both[0].result().count == reducer.least + 2
    assert [each.delta.digest() for each in updates] == before


@pytest.mark.parametrize("reducer", ALL, ids=repr)
@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_refused_update_leaves_the_reduction_as_it_was(reducer: Reducer, weight: float) -> None:
    reduction, sound = reducer.start(), [update(seed) for seed in range(reducer.least)]
    for each in sound:
        reduction.add(each)
    with pytest.raises(MalformedUpdate, match="weight"):
        reduction.add(update(99, weight))
    assert reduction.result() == reduced(reducer, sound)


@pytest.mark.parametrize("reducer", ALL, ids=repr)
def test_what_is_added_may_change_afterwards(reducer: Reducer) -> None:
    """Simulations use memory again once an update was taken in."""
    updates = [update(seed) for seed in range(reducer.least)]
    wanted, reduction = reduced(reducer, updates), reducer.start()
    for each in updates:
        tensors = {name: tensor.clone() for name, tensor in each.delta.items()}
        lent = Params(tensors)
        reduction.add(replace(each, delta=lent))
        for buffer in lent.buffers.values():
            buffer.fill_(7)
    assert reduction.result().delta == wanted.delta


@pytest.mark.parametrize("reducer", ALL, ids=repr)
def test_a_linear_reducer_needs_only_the_sum(reducer: Reducer) -> None:
    if not reducer.linear:
        return  # held against its paper's formula in tests/strategies/test_robust.py
    one, two = update(1, 1.0), update(2, 3.0)
    total = reduced(reducer, [one, two])
    mean = (one.delta["w"].double() + 3 * two.delta["w"].double()) / 4
    torch.testing.assert_close(total.delta["w"].double(), mean, rtol=1e-6, atol=1e-8)


def test_metrics_that_are_no_numbers_are_left_out() -> None:
    odd = replace(update(1), metrics={"loss": math.nan})
    assert "loss" in reduced(WeightedMean(), [odd, update(2)]).metrics
    assert "loss" not in reduced(WeightedMean(), [odd]).metrics
