"""A simulated world bends time and work; receipts tell of it as production's would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.operations import Receipt
from fedml.protocol.tasks import Brief, Task
from fedml.rounds import Cohort, Plan
from fedml.simulation.conditions import Diurnal, Dropout, Intermittent, Pace, Stragglers
from fedml.simulation.engine import Engine, Outcome
from fedml.simulation.executors.base import (
    Answer,
    CutTask,
    Executor,
    Holding,
    MakeExecutor,
    Memory,
)
from fedml.simulation.executors.inline import Inline
from fedml.simulation.world import LOST, Fate, Heterogeneous, Instant, World
from tests.contracts.test_executors import EXECUTORS
from tests.simulation.worlds import engine, holdings, plan, recipe, start

EPOCHS = Training(lr=1.0, epochs=5, batch_size=32)
BRIEF = Brief(start())
TINY = Holding(Rows(torch.zeros(40, 1), torch.zeros(40)), Rows(torch.zeros(10, 1), torch.zeros(10)))


def tasks(
    count: int, number: int = 1, attempt: int = 1, kind: str = "train", run: str = "r"
) -> list[Task]:
    mark = "e" if kind == "evaluate" else ""
    return [
        Task(
            TaskId(f"{run}.{number}.{mark}{attempt}.s{k}"), RunId(run), number, SiteId(f"s{k}"),
            "evaluate" if mark else "train", BRIEF,
        )
        for k in range(count)
    ]  # fmt: skip


def world(count: int = 4, a_plan: Plan | None = None, **parts: object) -> Heterogeneous:
    sites = {SiteId(f"s{k}"): TINY for k in range(count)}
    return Heterogeneous(a_plan or plan(), sites, **parts)  # type: ignore[arg-type]


def played(a_plan: Plan, **parts: object) -> Outcome:
    one = engine(a_plan)
    one.world = Heterogeneous(a_plan, holdings(), **parts)  # type: ignore[arg-type]
    return one.play()


def trained(outcome: Outcome) -> list[Receipt]:
    return [receipt for receipt in outcome.receipts if receipt.kind == "train"]


# --- pure laws -----------------------------------------------------------------------------------


def test_a_task_s_time_is_that_of_its_rows_and_bytes() -> None:
    even = Pace(rows_per_second=20.0, bytes_per_second=100.0, spread=0.0, link_spread=0.0)
    carried = 2 * BRIEF.params.layout.bytes / 100.0
    found = world(pace=even).fates(tasks(2), 0.0)
    assert [one.seconds for one in found] == [pytest.approx(3 * 32 / 20 + carried)] * 2
    scoring = world(pace=even).fates(tasks(1, kind="evaluate"), 0.0)
    assert scoring[0].seconds == pytest.approx(10 / 20 + carried)


def test_a_site_that_is_slow_takes_so_many_times_as_long() -> None:
    even = Pace(20.0, bytes_per_second=100.0, spread=0.0, link_spread=0.0)
    slow = replace(even, slow={tasks(2)[1].site: 10.0})
    usual, found = (world(pace=pace).fates(tasks(2), 0.0) for pace in (even, slow))
    assert found[0] == usual[0]
    assert found[1].seconds == pytest.approx(10 * usual[1].seconds)


def test_speeds_are_log_normal_around_their_median() -> None:
    paced = world(2000, pace=Pace(96.0, spread=0.7))
    seconds = np.log([fate.seconds for fate in paced.fates(tasks(2000), 0.0)])
    assert float(np.median(seconds)) == pytest.approx(0.0, abs=0.06)
    assert float(seconds.std()) == pytest.approx(0.7, abs=0.04)


def test_a_site_keeps_its_speed_and_a_fate_depends_on_names_alone() -> None:
    paced = world(50, pace=Pace(10.0), dropout=Dropout(0.3))
    first = paced.fates(tasks(50), 0.0)
    assert paced.fates(tasks(50)[::-1], 1e4)[::-1] == first
    assert paced.fates(tasks(50)[7:8], 0.0) == first[7:8]
    assert paced.fates(tasks(50, run="other"), 0.0) == first
    later = paced.fates(tasks(50, number=2), 0.0)
    kept = [
        (a.seconds, b.seconds) for a, b in zip(first, later, strict=True) if not a.lost + b.lost
    ]
    assert all(one == other for one, other in kept)
    assert [one.lost for one in later] != [one.lost for one in first]
    assert replace(paced, seed=1).fates(tasks(50), 0.0) != first


def test_as_many_straggle_as_the_share_says_and_others_each_round() -> None:
    slow = world(10, replace(plan(), training=EPOCHS), stragglers=Stragglers(0.9))
    seen = []
    for number in range(1, 6):
        late = [fate.seconds > 60.0 for fate in slow.fates(tasks(10, number), 0.0)]
        assert sum(late) == 9
        seen.append(tuple(late))
    assert len(set(seen)) > 1
    assert not any(fate.seconds for fate in slow.fates(tasks(10, kind="evaluate"), 0.0))


def test_a_straggler_s_part_is_uniform_over_one_epoch_to_all_but_one() -> None:
    some = replace(plan(), training=EPOCHS)
    slow = world(4000, some, stragglers=Stragglers(1.0), partial=True)
    done = [fate.work for fate in slow.fates(tasks(4000), 0.0)]
    counts = {share: done.count(share) for share in set(done)}
    assert sorted(counts) == [0.2, 0.4, 0.6, 0.8]
    assert all(900 < count < 1100 for count in counts.values())
    by_steps = world(400, plan(), stragglers=Stragglers(1.0), partial=True)
    assert {fate.work for fate in by_steps.fates(tasks(400), 0.0)} == {1 / 3, 2 / 3}
    whole = replace(plan(), training=Training(lr=1.0, steps=1))
    unparted = world(4, whole, stragglers=Stragglers(1.0), partial=True)
    assert all(fate.seconds > 60.0 for fate in unparted.fates(tasks(4), 0.0))


def test_who_is_too_slow_does_what_fits_if_parts_are_wanted() -> None:
    slow = Pace(rows_per_second=1.0, spread=0.0)  # 96 seconds of work, 60 of time
    assert world(pace=slow).fates(tasks(1), 0.0) == [Fate(96.0)]
    (fate,) = world(pace=slow, partial=True).fates(tasks(1), 0.0)
    assert (fate.work, fate.seconds < 60.0) == (1 / 3, True)  # one of three whole steps
    hopeless = Pace(rows_per_second=0.4, spread=0.0)
    assert world(pace=hopeless, partial=True).fates(tasks(1), 0.0) == [Fate(240.0)]


def test_tasks_are_lost_as_often_as_said_and_on_their_way() -> None:
    found = world(4000, pace=Pace(96.0, spread=0.0), dropout=Dropout(0.25)).fates(tasks(4000), 0.0)
    lost = [fate.seconds for fate in found if fate.lost]
    assert len(lost) / 4000 == pytest.approx(0.25, abs=0.03)
    assert 0 < min(lost) < 0.1
    assert 0.9 < max(lost) < 1.0


@pytest.mark.parametrize("hours", [Diurnal(0.3, 1000.0), Intermittent(0.3, 50.0)], ids=str)
def test_a_share_of_the_sites_is_there_and_the_others_come_back(
    hours: Diurnal | Intermittent,
) -> None:
    there = world(2000, availability=hours)
    sites = list(there.holdings)
    absent = []
    for now in (0.0, 333.0, 5000.5):
        away = there.away(sites, now)
        assert 1 - len(away) / 2000 == pytest.approx(0.3, abs=0.04)
        assert all(back > now for back in away.values())
        for site in list(away)[:50]:
            assert site not in there.away([site], away[site] + 1e-6)
            assert site in there.away([site], (now + away[site]) / 2)
        absent.append(frozenset(away))
    assert len(set(absent)) == 3


def test_days_have_hours_and_one_time_zone_sleeps_together() -> None:
    zone = world(20, availability=Diurnal(0.5, 100.0, offset=0.0))
    sites = list(zone.holdings)
    assert zone.away(sites, 49.0) == {}
    assert set(zone.away(sites, 51.0).values()) == {100.0}


# --- in the engine -------------------------------------------------------------------------------


def test_a_deadline_cuts_off_the_slow_and_the_receipt_says_so() -> None:
    a_plan = plan(rounds=3)
    outcome = played(a_plan, pace=Pace(8.0, spread=2.5))
    assert outcome.end.state == "done"
    for receipt in trained(outcome):
        assert receipt.missing
        assert set(receipt.missing.values()) == {"no answer within 60 s"}
        assert receipt.closed - receipt.opened == 60.0
    assert len({frozenset(r.missing) for r in trained(outcome)}) == 1  # the same ones are slow
    assert outcome.seconds == outcome.receipts[-1].closed


def test_a_round_lasts_as_long_as_its_slowest_site() -> None:
    a_plan, pace = plan(rounds=2), Pace(50.0)
    outcome = played(a_plan, pace=pace)
    slowest = max(pace.computing(site, 96, 0) for site in holdings())
    assert slowest < 60
    first, second = trained(outcome)
    assert first.closed - first.opened == pytest.approx(slowest)
    assert second.opened == first.closed
    assert not first.missing


@dataclass
class Watched:
    """An executor that notes which tasks it was given."""

    inner: Executor
    seen: list[Task] = field(default_factory=list)

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        self.seen.extend(tasks)
        return self.inner.run(tasks)


@pytest.mark.parametrize("partial", [False, True])
def test_stragglers_are_dropped_or_hand_in_what_they_have(partial: bool) -> None:
    a_plan = replace(plan(rounds=4, quorum=1), training=EPOCHS)
    watched = Watched(Inline(a_plan, recipe(), holdings()))
    one = engine(a_plan, watched)
    one.world = Heterogeneous(a_plan, holdings(), stragglers=Stragglers(0.75), partial=partial)
    outcome = one.play()
    cut = [task for task in watched.seen if isinstance(task, CutTask)]
    for receipt in trained(outcome):
        assert len(receipt.counted) == (4 if partial else 1)
        assert len(receipt.missing) == (0 if partial else 3)
        assert receipt.closed - receipt.opened == pytest.approx(59.4 if partial else 60.0)
    assert len(cut) == (12 if partial else 0)
    assert sum(task.kind == "train" for task in watched.seen) == (16 if partial else 4)


def test_what_is_lost_is_tried_again() -> None:
    a_plan = plan(rounds=4, quorum=4, attempts=40)
    outcome = played(a_plan, dropout=Dropout(0.3), pace=Pace(50.0))
    assert outcome.end.state == "done"
    failed = [receipt for receipt in trained(outcome) if not receipt.model]
    assert failed
    assert max(receipt.attempt for receipt in outcome.receipts) > 1
    for receipt in failed:
        assert LOST in receipt.missing.values()
    assert all(len(r.counted) == 4 for r in outcome.receipts if r.model)


def test_a_run_waits_for_its_quorum_and_says_who_was_away() -> None:
    a_plan = replace(plan(rounds=16, quorum=3, attempts=20), patience=1e5)
    hours = Diurnal(0.6, 1000.0, offset=0.5)

    def awake(now: float) -> set[SiteId]:
        return {site for site in holdings() if hours.back(site, now, 0) <= now}

    outcome = played(a_plan, availability=hours, pace=Pace(2.0, spread=0.0))
    assert outcome.end.state == "done"
    closed, waits = 0.0, 0
    for receipt in outcome.receipts:
        assert set(receipt.asked) == awake(receipt.opened)
        assert len(receipt.asked) >= 3
        assert receipt.left_out.keys() == set(holdings()) - awake(receipt.opened)
        assert set(receipt.left_out.values()) <= {"not connected"}
        if receipt.opened > closed:  # it waited, and no longer than it had to
            waits += 1
            assert len(awake(receipt.opened - 1.5)) < 3
        closed = receipt.closed
    assert waits == 2  # before the first round, and for one night


def test_patience_ends_a_wait_for_sites_that_do_not_come() -> None:
    a_plan = replace(plan(quorum=4), patience=50.0)
    outcome = played(a_plan, availability=Diurnal(0.01, 1e6))
    assert outcome.end.state == "failed"
    assert "waited 50 s: 4 sites are needed" in outcome.end.detail
    assert "not connected" in outcome.end.detail
    assert outcome.seconds == 50.0


def test_an_answer_ready_while_its_site_is_away_comes_when_it_is_back() -> None:
    zone = Diurnal(0.5, 40.0, offset=0.0)  # there for 20 seconds, away for 20
    pace = Pace(96 / 25, spread=0.0)  # 25 seconds of work
    assert played(plan(rounds=1), availability=zone, pace=pace).receipts[0].closed == 40.0


def test_the_same_seed_gives_the_same_receipts() -> None:
    def run(seed: int) -> tuple[Receipt, ...]:
        return played(
            replace(plan(rounds=3, quorum=1, attempts=20), patience=1e5), seed=seed,
            pace=Pace(8.0), dropout=Dropout(0.2), availability=Diurnal(0.6, 500.0),
            stragglers=Stragglers(0.25), partial=True,
        ).receipts  # fmt: skip

    assert run(1) == run(1)
    assert run(1) != run(2)


HERE = [make for name, make in EXECUTORS.items() if name != "Cluster"]  # that needs Ray


@pytest.mark.parametrize("make", HERE, ids=lambda make: make.__name__)
def test_every_executor_lives_in_the_same_world(make: MakeExecutor) -> None:
    a_plan = replace(plan(rounds=2, quorum=1, attempts=20), training=EPOCHS, patience=1e5)

    def receipts(executor: Executor) -> tuple[Receipt, ...]:
        one = engine(a_plan, executor)
        one.world = Heterogeneous(
            a_plan, holdings(), pace=Pace(20.0), dropout=Dropout(0.2),
            stragglers=Stragglers(0.5), partial=True,
        )  # fmt: skip
        return one.play().receipts

    found = receipts(make(a_plan, recipe(), holdings(), Memory()))
    expected = receipts(Inline(a_plan, recipe(), holdings()))
    for one, other in zip(found, expected, strict=True):
        assert (one.asked, one.missing, one.left_out) == (
            other.asked,
            other.missing,
            other.left_out,
        )
        assert (one.opened, one.closed, one.attempt) == (other.opened, other.closed, other.attempt)
        assert [(c.site, c.weight) for c in one.counted] == [
            (c.site, c.weight) for c in other.counted
        ]
        assert one.metrics == pytest.approx(other.metrics, rel=1e-4)


def test_an_instant_world_takes_no_time() -> None:
    instant: World = Instant()
    one: Engine = engine(plan())
    one.world = instant
    assert one.play().seconds == 0.0


# --- what cannot be ------------------------------------------------------------------------------


def test_parts_of_private_tasks_are_refused() -> None:
    private = plan(
        privacy=Privacy("record", epsilon=5.0, delta=1e-5, rounds=3, evaluation_epsilon=1)
    )
    with pytest.raises(ConfigError, match=r"world\.partial under privacy"):
        world(a_plan=private, partial=True)
    world(a_plan=private, stragglers=Stragglers(0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pace(0.0), "rows_per_second 0.0.* must be above 0"),
        (lambda: Pace(1.0, -1.0), "bytes_per_second -1.0"),
        (lambda: Pace(1.0, spread=-1.0), "spread -1.0"),
        (lambda: Pace(1.0, spread=math.nan), "spread nan"),
        (lambda: Pace(1.0, slow={"site-1": 0.0}), "world.pace.slow site-1: 0.0"),
        (lambda: Stragglers(1.5), r"world.stragglers.share 1.5: a share lies in \[0, 1\]"),
        (lambda: Dropout(-0.1), "world.dropout.share -0.1"),
        (lambda: Diurnal(0.0), r"world.availability.share 0.0: a share lies in \(0, 1\]"),
        (lambda: Diurnal(0.5, 0.0), "world.availability.period 0.0"),
        (lambda: Diurnal(0.5, 1.0, 2.0), "world.availability.offset 2.0"),
        (lambda: Intermittent(0.0), "world.availability.share 0.0"),
        (lambda: Intermittent(0.5, math.inf), "world.availability.period inf"),
    ],
)
def test_a_world_that_cannot_be_says_why(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_cohort_of_none_straggles_not() -> None:
    sizes: Mapping[int, int] = {n: len(Stragglers(0.5).choose(tasks(n), 0)) for n in (0, 1, 3, 4)}
    assert sizes == {0: 0, 1: 0, 3: 2, 4: 2}
    assert Cohort(quorum=1, deadline=1.0).size == 0
