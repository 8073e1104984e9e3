"""Many updates at once count as one by one: the same bits, the same account."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedml.errors import MalformedUpdate
from fedml.params import Params
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.tasks import Brief, Stack, Update
from fedml.rounds import Opening, Round, StackArrived, UpdateArrived
from fedml.rounds.round import Close, Command, DeadlinePassed, Event, Fail
from fedml.simulation.marks import mark_of, marks_of
from fedml.stacked import Stacked
from fedml.strategies import Aggregate, Reduction, WeightedMean, add_stack
from tests.rounds.worlds import RUN

NAMES = tuple(SiteId(f"s{k}") for k in range(6))
OPENING = Opening(RUN, 1, 1, NAMES, quorum=1, deadline=60.0)
MODEL = Params(
    {"w": torch.zeros(3), "d": torch.zeros(2, dtype=torch.float64), "n": torch.tensor(0)}
)
BRIEF = Brief(MODEL)


@dataclass(frozen=True)
class Slotted:
    """A reducer that has no way of its own to take stacks."""

    linear: bool = True

    def start(self) -> Reduction:
        return _OneByOne()


class _OneByOne:
    def __init__(self) -> None:
        self._mean = WeightedMean().start()

    def add(self, update: Update) -> None:
        self._mean.add(update)

    def result(self) -> Aggregate:
        return self._mean.result()


def delta(value: float, place: int) -> Params:
    w = torch.tensor([value, value / 3, -value])
    return Params({"w": w, "d": torch.tensor([value, 0.1]).double(), "n": torch.tensor(place)})


def stacked(updates: Sequence[Update]) -> Stack:
    return Stack(
        updates[0].round,
        tuple(one.site for one in updates),
        tuple(one.task for one in updates),
        Stacked([one.delta for one in updates]),
        tuple(one.weight for one in updates),
        {name: Stacked([one.slots[name] for one in updates]) for name in updates[0].slots},
        {name: [one.metrics[name] for one in updates] for name in updates[0].metrics},
        [one.epsilon for one in updates],
    )


def feed(
    events: Sequence[Event], reducer: object = None, reports: frozenset[str] = frozenset()
) -> Close | Fail:
    round_ = Round(OPENING, reducer or WeightedMean(), reports)  # type: ignore[arg-type]
    commands: list[Command] = list(round_.open(BRIEF))
    for event in (*events, DeadlinePassed()):
        commands += round_.handle(event)
    [end] = [c for c in commands if isinstance(c, Close | Fail)]
    return end


def same(one: Close | Fail, other: Close | Fail) -> None:
    assert type(one) is type(other)
    assert one.account == other.account
    if isinstance(one, Close) and isinstance(other, Close):
        assert isinstance(one.total, Aggregate)
        assert isinstance(other.total, Aggregate)
        assert one.total.delta.digest() == other.total.delta.digest()
        assert [s.digest() for s in one.total.slots.values()] == [
            s.digest() for s in other.total.slots.values()
        ]
        assert one.total.metrics == other.total.metrics
        assert (one.total.weight, one.total.count) == (other.total.weight, other.total.count)


values = st.one_of(
    st.floats(-1e3, 1e3, width=32), st.sampled_from([math.nan, math.inf, 3e9, -4e9, 0.0])
)
weights = st.one_of(st.floats(0.1, 1e3), st.sampled_from([0.0, -1.0, math.nan, math.inf, 2e15]))
tasks = st.sampled_from(["right", "right", "right", "old"])
sent = st.tuples(st.sampled_from([*NAMES, SiteId("stranger")]), values, weights, tasks)


def updates_of(history: Sequence[tuple[SiteId, float, float, str]], slot: bool) -> list[Update]:
    found = []
    for place, (site, value, weight, task) in enumerate(history):
        id = OPENING.task_id(site) if task == "right" else TaskId(f"run-1.1.0.{site}")
        slots = {"control": delta(-value, place)} if slot else {}
        metrics = {"loss": value / 7}
        found.append(Update(id, 1, site, delta(value, place), weight, slots, metrics, 0.1 * place))
    return found


@given(
    st.lists(sent, min_size=1, max_size=12),
    st.lists(st.integers(1, 4), min_size=12, max_size=12),
    st.booleans(),
    st.booleans(),
)
def test_any_split_into_stacks_and_singles_gives_the_same_bits_and_account(
    history: list[tuple[SiteId, float, float, str]], cuts: list[int], slot: bool, plain: bool
) -> None:
    updates = updates_of(history, slot)
    reports = frozenset({"control"}) if slot else frozenset[str]()
    reducer = Slotted() if plain else WeightedMean()
    singles = feed([UpdateArrived(one, f"d{k}") for k, one in enumerate(updates)], reducer, reports)
    events: list[Event] = []
    place = 0
    for size in cuts:
        part = updates[place : place + size]
        told = tuple(f"d{place + k}" for k in range(len(part)))
        if len(part) == 1:
            events.append(UpdateArrived(part[0], told[0]))
        elif part:
            events.append(StackArrived(stacked(part), told))
        place += size
    same(singles, feed(events, reducer, reports))


@given(st.randoms(use_true_random=False), st.integers(1, 6))
def test_the_order_of_rows_and_stacks_moves_no_bit(shuffler: random.Random, size: int) -> None:
    updates = updates_of(
        [(site, 1.7 * k - 3, 1.0 + k, "right") for k, site in enumerate(NAMES)], slot=False
    )
    mixed = list(updates)
    shuffler.shuffle(mixed)
    parts = [mixed[k : k + size] for k in range(0, len(mixed), size)]
    first = feed([UpdateArrived(one) for one in updates])
    same(first, feed([StackArrived(stacked(part)) for part in parts]))


def sound() -> list[Update]:
    return updates_of([(site, 1.0, 2.0, "right") for site in NAMES], slot=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"round": 2}, "it is for round 2"),
        ({"slots": {"control": delta(1.0, 1)}}, "has slots ['control'], rule plain reports []"),
        ({"metrics": {"x" * 65: 1.0}}, "printable letters"),
        ({"delta": Params({"w": torch.zeros(4)})}, "names differ"),
    ],
)
def test_what_is_wrong_with_a_stack_is_wrong_with_every_row(
    changes: dict[str, object], reason: str
) -> None:
    bad = [replace(one, **changes) for one in sound()]  # type: ignore[arg-type]
    end = feed([StackArrived(stacked(bad))])
    assert isinstance(end, Fail)
    assert all(reason in why for why in end.account.missing.values())
    same(end, feed([UpdateArrived(one) for one in bad]))


def test_one_bad_row_costs_its_own_site_alone() -> None:
    rows = sound()
    rows[2] = replace(rows[2], delta=delta(math.nan, 0))
    rows[4] = replace(rows[4], delta=delta(3e9, 0))
    end = feed([StackArrived(stacked(rows))])
    assert isinstance(end, Close)
    assert isinstance(end.total, Aggregate)
    assert end.total.count == 4
    assert "its norm is nan" in end.account.missing["s2"]
    assert "do not fit the sum" in end.account.missing["s4"]


def test_a_stack_is_no_answer_to_an_evaluation() -> None:
    opening = replace(OPENING, kind="evaluate")
    round_ = Round(opening, WeightedMean())
    round_.open(BRIEF)
    rows = [replace(one, task=opening.task_id(one.site)) for one in sound()]
    [end] = round_.handle(StackArrived(stacked(rows)))
    assert isinstance(end, Fail)
    assert "it is an update" in end.account.missing["s0"]


def test_a_row_is_marked_as_the_update_it_stands_for() -> None:
    rows = updates_of([(site, 1.3 * k, 1.0, "right") for k, site in enumerate(NAMES)], slot=True)
    marks = marks_of(stacked(rows))
    assert marks == tuple(mark_of(one) for one in rows)
    assert len({*marks}) == len(rows)


def test_rows_come_back_as_they_went_in() -> None:
    rows = updates_of([(site, 1.3 * k, 1.0, "right") for k, site in enumerate(NAMES)], slot=True)
    stack = stacked(rows)
    assert [stack.update(k) for k in range(len(stack))] == rows
    assert [stack.take([4, 1]).update(k) for k in range(2)] == [rows[4], rows[1]]


def test_parts_of_unequal_length_make_no_stack() -> None:
    with pytest.raises(MalformedUpdate, match="parts of"):
        replace(stacked(sound()), weights=(1.0,))


def test_a_reduction_without_stacks_of_its_own_takes_them_row_by_row() -> None:
    rows = sound()
    rows[1] = replace(rows[1], weight=0.0)
    own, other = WeightedMean().start(), Slotted().start()
    assert add_stack(own, stacked(rows)) == add_stack(other, stacked(rows))
    assert own.result().delta.digest() == other.result().delta.digest()


def test_what_is_not_elementwise_is_asked_of_rows() -> None:
    stack = stacked(sound()).delta
    for question in (stack.norm, stack.digest):
        with pytest.raises(TypeError, match="ask its rows"):
            question()
    assert stack["w"].shape == (6, 3)
