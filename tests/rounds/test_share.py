"""A region's share: exact sums of those who answer well, each leaf in one of them or lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedml.params import Params
from fedml.protocol.messages import Lot, RunId, SiteId, TaskId
from fedml.protocol.tasks import Brief, Report, Sum, Update
from fedml.rounds import Opening, ReportArrived, Round, SiteLost, SumArrived, UpdateArrived
from fedml.rounds.round import Close, DeadlinePassed, Fail
from fedml.rounds.share import (
    Ask,
    Deliver,
    Discard,
    Lose,
    Pass,
    Scoring,
    Seal,
    Step,
    Summing,
)
from fedml.strategies import Aggregate, Reducer, WeightedMean
from fedml.strategies.robust import Median

MODEL = Params({"w": torch.zeros(5, 3), "b": torch.zeros(4), "n": torch.tensor([3])})
BRIEF = Brief(MODEL)
NAMES = tuple(f"site-{k}" for k in range(6))


def lot(name: str) -> Lot:
    return Lot(SiteId(name), TaskId(f"run.1.1.{name}"), 0)


LOTS = [lot(name) for name in NAMES]


def update(name: str, scale: float = 1.0, **changes: object) -> Update:
    rng = torch.Generator().manual_seed(NAMES.index(name) if name in NAMES else 99)
    delta = Params(
        {
            "w": torch.randn(5, 3, generator=rng) * 10.0 ** NAMES.index(name),
            "b": torch.randn(4, generator=rng) * scale,
            "n": torch.tensor([NAMES.index(name)]),
        }
    )
    weight = 1.0 + NAMES.index(name) / 3
    base = Update(
        lot(name).task, 1, SiteId(name), delta, weight, {}, {"loss": weight / 7}, epsilon=0.5
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def arrived(name: str) -> UpdateArrived:
    return UpdateArrived(update(name), f"digest of {name}")


def seals(steps: Sequence[Step]) -> list[Sum]:
    return [step.total for step in steps if isinstance(step, Seal)]


def opened(reducer: Reducer | None = None, quorum: int = 1) -> Round:
    opening = Opening(RunId("run"), 1, 1, tuple(map(SiteId, NAMES)), quorum, 60.0)
    round_ = Round(opening, reducer or WeightedMean())
    round_.open(BRIEF)
    return round_


def flat(names: Sequence[str] = NAMES) -> Close:
    round_ = opened()
    for name in set(NAMES) - set(names):
        round_.handle(SiteLost(SiteId(name), "away"))
    for name in names:
        commands = round_.handle(arrived(name))
    (close,) = (c for c in commands if isinstance(c, Close))
    return close


def same(one: Close, other: Close) -> bool:
    assert isinstance(one.total, Aggregate)
    assert isinstance(other.total, Aggregate)
    bits = one.total.delta.digest() == other.total.delta.digest()
    return (
        bits
        and replace(one, total={}) == replace(other, total={})
        and (replace(one.total, delta=MODEL) == replace(other.total, delta=MODEL))
    )


@given(order=st.permutations(NAMES), cut=st.integers(0, 6), tail=st.booleans())
def test_sums_of_any_split_in_any_order_are_the_flat_sum_to_the_bit(
    order: list[str], cut: int, tail: bool
) -> None:
    shares = [Summing(1, BRIEF), Summing(1, BRIEF)]
    halves = [order[:cut], order[cut:]]
    sums = []
    for share, names in zip(shares, halves, strict=True):
        share.ask([lot(name) for name in names])
        for name in reversed(names):
            sums += seals(share.handle(arrived(name)))
    round_ = opened()
    commands = []
    for total in reversed(sums) if tail else sums:
        commands = round_.handle(SumArrived(total, SiteId("region")))
    (close,) = (c for c in commands if isinstance(c, Close))
    assert same(close, flat())


def test_a_total_can_be_asked_for_again_and_goes_on() -> None:
    reduction = WeightedMean().start()
    reduction.add(update(NAMES[0]))
    first = {name: part.digest() for name, part in reduction.total()[0].items()}
    assert {name: part.digest() for name, part in reduction.total()[0].items()} == first
    reduction.add(update(NAMES[1]))
    plain = WeightedMean().start()
    for name in NAMES[:2]:
        plain.add(update(name))
    assert reduction.result().delta.digest() == plain.result().delta.digest()


def test_a_region_s_sum_and_sites_of_one_s_own_add_up() -> None:
    share = Summing(1, BRIEF)
    share.ask(LOTS[:3])
    for name in NAMES[:3]:
        steps = share.handle(arrived(name))
    round_ = opened()
    round_.handle(arrived(NAMES[4]))
    round_.handle(SumArrived(seals(steps)[0], SiteId("region")))
    round_.handle(arrived(NAMES[3]))
    (close,) = (c for c in round_.handle(arrived(NAMES[5])) if isinstance(c, Close))
    assert same(close, flat())


@given(data=st.data())
def test_whatever_happens_a_task_is_in_one_sealed_sum_or_lost_or_waited_for(
    data: st.DataObject,
) -> None:
    share, sealed, lost = Summing(1, BRIEF), list[frozenset[TaskId]](), set[TaskId]()
    asked: set[TaskId] = set()
    for _ in range(data.draw(st.integers(1, 14))):
        what = data.draw(st.sampled_from(["ask", "arrive", "lose", "late", "back"]))
        some = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
        named = {lot(name).task for name in some}
        if what == "ask":
            asked |= named
        elif what == "back":
            asked, lost = asked - named, lost - named
        for step in happen(share, what, some):
            match step:
                case Seal(total):
                    sealed.append(frozenset(s.task for s in total.summands))
                case Discard(tasks):
                    sealed.remove(tasks)
                case Deliver(tasks):
                    assert tasks in sealed
                case Lose(gone):
                    lost.add(gone.task)
                case Ask() | Pass():
                    pass
        inside = [task for tasks in sealed for task in tasks]
        assert len(inside) == len(set(inside))  # none counts twice
        assert set(inside) <= asked
        assert not set(inside) & lost
        assert lost <= asked


def happen(share: Summing, what: str, names: Sequence[str]) -> list[Step]:
    match what:
        case "ask":
            return share.ask([lot(name) for name in names])
        case "arrive":
            return [step for name in names for step in share.handle(arrived(name))]
        case "lose":
            return share.handle(SiteLost(SiteId(names[0]), "away"))
        case "late":
            return share.handle(DeadlinePassed())
        case _:
            return share.take_back([lot(name).task for name in names])


def test_orders_that_come_again_deliver_a_sum_that_is_whole_and_discard_one_that_is_not() -> None:
    share = Summing(1, BRIEF)
    assert share.ask(LOTS[:2]) == [Ask(each) for each in LOTS[:2]]
    assert share.ask(LOTS[:2]) == []  # under way
    for name in NAMES[:2]:
        steps = share.handle(arrived(name))
    tasks = frozenset(each.task for each in LOTS[:2])
    assert len(seals(steps)) == 1
    assert share.ask(LOTS[:3]) == [Deliver(tasks), Ask(LOTS[2])]
    assert share.ask(LOTS[1:2]) == [Discard(tasks), Ask(LOTS[1])]


def test_what_is_summed_with_one_that_is_taken_back_is_asked_for_anew() -> None:
    share = Summing(1, BRIEF)
    share.ask(LOTS[:3])
    share.handle(arrived(NAMES[0]))
    share.handle(arrived(NAMES[1]))
    assert share.take_back([LOTS[0].task]) == [Ask(LOTS[1])]
    assert share.handle(arrived(NAMES[2])) == []  # the other is waited for again
    (total,) = seals(share.handle(arrived(NAMES[1])))
    assert [s.site for s in total.summands] == [NAMES[1], NAMES[2]]
    assert share.take_back([LOTS[1].task]) == [
        Discard(frozenset({LOTS[1].task, LOTS[2].task})),
        Ask(LOTS[2]),
    ]


def test_at_the_deadline_what_there_is_is_sealed() -> None:
    share = Summing(1, BRIEF)
    share.ask(LOTS[:3])
    share.handle(arrived(NAMES[0]))
    share.take_back([LOTS[1].task])
    lost, sealed = share.handle(DeadlinePassed())
    assert lost == Lose(LOTS[2], "no answer in time for its region")
    assert isinstance(sealed, Seal)
    share.ask(LOTS[3:5])
    share.handle(arrived(NAMES[3]))
    share.take_back([LOTS[4].task])  # and nobody is waited for
    assert len(seals(share.handle(DeadlinePassed()))) == 1


def test_a_share_after_a_restart_knows_its_sealed_sums() -> None:
    tasks = frozenset(each.task for each in LOTS[:2])
    share = Summing(1, BRIEF, LOTS[:3], [tasks])
    assert share.ask(LOTS[:3]) == [Deliver(tasks), Ask(LOTS[2])]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (update("site-0", round=2), "it is for round 2"),
        (update("site-0", weight=-1.0), "weight -1.0"),
        (update("site-0", slots={"x": MODEL}), "it has slots"),
        (update("site-0", delta=Params({"w": torch.zeros(2)})), "names differ"),
        (update("site-0", scale=float("nan")), "training diverged"),
    ],
)
def test_a_leaf_hears_what_it_would_hear_of_a_flat_round(bad: Update, why: str) -> None:
    share, round_ = Summing(1, BRIEF), opened()
    share.ask(LOTS[:1])
    (loss,) = share.handle(UpdateArrived(bad))
    assert isinstance(loss, Lose)
    assert why in loss.reason
    round_.handle(UpdateArrived(bad))
    (fail,) = (c for c in round_.handle(DeadlinePassed()) if isinstance(c, Fail))
    assert fail.account.missing[SiteId("site-0")] == loss.reason
    assert share.ask(LOTS[:1]) == [loss]  # told again to a parent that did not hear


def a_sum(names: Sequence[str]) -> Sum:
    share = Summing(1, BRIEF)
    share.ask([lot(name) for name in names])
    steps: list[Step] = []
    for name in names:
        steps = share.handle(arrived(name))
    return seals(steps)[0]


def test_a_sum_counts_whole_or_not_at_all() -> None:
    round_, total = opened(), a_sum(NAMES[:3])
    round_.handle(SiteLost(SiteId(NAMES[1]), "away"))
    round_.handle(SumArrived(total, SiteId("region")))
    commands = round_.handle(DeadlinePassed())
    (fail,) = (c for c in commands if isinstance(c, Fail))
    assert not fail.account.counted
    assert "not waited for" in fail.account.missing[SiteId(NAMES[0])]


def test_a_sum_that_comes_twice_counts_once() -> None:
    round_, total = opened(), a_sum(NAMES)
    (close,) = (c for c in round_.handle(SumArrived(total, SiteId("r"))) if isinstance(c, Close))
    assert round_.handle(SumArrived(total, SiteId("r"))) == []
    assert same(close, flat())
    round_ = opened()
    half = a_sum(NAMES[:3])
    twice = replace(half, summands=half.summands * 2)
    round_.handle(SumArrived(twice, SiteId("r")))
    assert "0 of 6" in round_.progress


def spoiled(total: Sum, how: str) -> Sum:
    match how:
        case "beyond":
            return replace(total, reach={"delta": 7})
        case "endless":
            return replace(total, reach={"delta": 2**63})
        case "unsaid":
            return replace(total, reach={})
        case "layout":
            return replace(total, parts={**total.parts, "most/delta": MODEL})
        case "foreign":
            return replace(total, parts={**total.parts, "most/slot": total.parts["most/delta"]})
        case "short":
            return replace(total, parts={"most/delta": total.parts["most/delta"]})
        case "weight":
            first = replace(total.summands[0], weight=0.0)
            return replace(total, summands=(first, *total.summands[1:]))
        case "metric":
            first = replace(total.summands[0], metrics={"x" * 65: 1.0})
            return replace(total, summands=(first, *total.summands[1:]))
        case _:
            return replace(total, round=2)


@pytest.mark.parametrize(
    "how",
    ["beyond", "endless", "unsaid", "layout", "foreign", "short", "weight", "metric", "round"],
)
def test_a_sum_that_cannot_be_is_refused_and_spoils_nothing(how: str) -> None:
    round_ = opened()
    round_.handle(SumArrived(spoiled(a_sum(NAMES[:2]), how), SiteId("region")))
    assert "0 of 6 sites answered, 2 lost" in round_.progress
    for name in NAMES[2:]:
        commands = round_.handle(arrived(name))
    (close,) = (c for c in commands if isinstance(c, Close))
    assert isinstance(close.total, Aggregate)
    assert close.total.delta.digest() == flat(NAMES[2:]).total.delta.digest()  # type: ignore[union-attr]


def test_a_sum_that_no_int64_holds_is_the_leaves_loss() -> None:
    share = Summing(1, BRIEF)
    share.ask(LOTS[:2])
    large = Params({**MODEL, "w": torch.full((5, 3), 1.5e9)})
    share.handle(UpdateArrived(replace(update("site-0"), delta=large)))
    steps = share.handle(UpdateArrived(replace(update("site-1"), delta=large)))
    assert [type(step) for step in steps] == [Lose, Lose]
    assert isinstance(steps[0], Lose)
    assert "the sum holds" in steps[0].reason


def test_sums_that_fit_each_and_not_together_end_the_round_as_the_updates_would() -> None:
    large = Params({**MODEL, "w": torch.full((5, 3), 1.5e9)})
    heavy = [replace(update(name), delta=large, weight=1.0) for name in NAMES[:2]]
    tree, plain = opened(), opened()
    for one in heavy:
        share = Summing(1, BRIEF)
        share.ask([lot(one.site)])
        (total,) = seals(share.handle(UpdateArrived(one)))
        tree.handle(SumArrived(total, SiteId("region")))
        plain.handle(UpdateArrived(one))
    fails = [round_.handle(DeadlinePassed())[-1] for round_ in (tree, plain)]
    assert isinstance(fails[0], Fail)
    assert isinstance(fails[1], Fail)
    assert str(fails[0].error) == str(fails[1].error)
    assert "the updates add up to" in str(fails[0].error)


def test_a_reducer_that_needs_each_update_takes_no_sum() -> None:
    round_ = opened(Median(f=1), quorum=3)
    round_.handle(SumArrived(a_sum(NAMES[:3]), SiteId("region")))
    assert "0 of 6 sites answered, 3 lost" in round_.progress


def test_reports_go_up_as_they_are_and_a_report_is_no_update() -> None:
    share, report = Scoring(), Report(LOTS[0].task, 1, LOTS[0].site, {"accuracy": 3.0}, 4.0)
    assert share.ask(LOTS[:2]) == [Ask(LOTS[0]), Ask(LOTS[1])]
    assert share.handle(ReportArrived(report)) == [Pass(report)]
    assert share.handle(ReportArrived(report)) == []
    assert share.ask(LOTS[:1]) == [Ask(LOTS[0])]  # a leaf keeps its report
    assert share.handle(SiteLost(LOTS[1].site, "away", final=True)) == [Lose(LOTS[1], "away", True)]
    summing = Summing(1, BRIEF)
    summing.ask(LOTS[:1])
    (loss,) = summing.handle(ReportArrived(report))
    assert isinstance(loss, Lose)
    assert loss.reason == "answer refused: it is a report, not an update"
