"""A million sites cost what a hundred do: nothing is listed, and rows are made when asked for."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows
from fedml.protocol.messages import Privacy, RunId, SiteId, Training, check_name
from fedml.rounds import Cohort, Plan, Pool, Run
from fedml.simulation.crowd import Crowd, Heap, Made, Users, hashes, lots
from fedml.simulation.engine import Engine, Outcome, statuses
from fedml.simulation.executors.base import StackedHoldings, stack_rows
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from fedml.simulation.population import ShippedData
from tests.simulation.models import Toy, first, toy_plan
from tests.simulation.worlds import recipe

MILLION = 10**6


def crowd(size: int = MILLION, train: int = 6, held_out: int = 2) -> Users:
    return Users(Made(8), size, train, held_out)


def a_plan(size: int = 20, **changes: object) -> Plan:
    base = toy_plan(Training(lr=0.1, epochs=1, batch_size=4))
    return replace(base, cohort=Cohort(quorum=1, deadline=9.0, size=size), **changes)  # type: ignore[arg-type]


def play(plan: Plan, users: Users, kind: type[Vectorised] | type[Inline] = Vectorised) -> Outcome:
    run = Run.begin(RunId("r"), plan, first(Toy()))
    return Engine(run, kind(plan, Toy(), users), statuses(plan, users)).play()


def test_a_site_s_rows_are_the_same_however_they_are_asked_for() -> None:
    for users in (crowd(), Users(Heap(Rows(torch.randn(50, 3), torch.arange(50))), 1000, 4, 1)):
        assert isinstance(users, StackedHoldings)
        names = [users.name(k) for k in (7, 999, 0)]
        stack = users.stack(names)
        assert list(users.counts(names)) == list(stack.counts)
        for row, name in enumerate(names):
            holding = users[name]
            assert torch.equal(holding.train.x, stack.x[row])
            assert torch.equal(holding.train.y, stack.y[row])
            assert not torch.equal(holding.held_out.x[0], holding.train.x[0])
        plain = stack_rows({name: users[name] for name in names}, names)
        assert torch.equal(plain.x, stack.x)


def test_no_two_users_share_made_rows_and_seeds_make_others() -> None:
    users = crowd(5000)
    x = users.stack([users.name(k) for k in range(5000)]).x.reshape(-1, 8)
    assert len(x.unique(dim=0)) == len(x)
    assert float(x.mean()) == pytest.approx(0, abs=0.01)
    assert float(x.std()) == pytest.approx(3**-0.5, abs=0.01)
    other = Users(Made(8, seed=1), 5000, 6, 2)
    assert not torch.equal(other[SiteId("user-0000")].train.x, users[SiteId("user-0000")].train.x)


def test_names_are_fit_for_sites_and_strangers_are_none() -> None:
    users = crowd(1000)
    names = list(itertools.islice(users, 3))
    assert names == ["user-000", "user-001", "user-002"]
    assert all(check_name("site", name) in users for name in names)
    assert len(users) == 1000
    for stranger in ("user-1000", "user-1", "bern", "user-0001", "user-xyz", ""):
        assert stranger not in users
        with pytest.raises(KeyError):
            users[SiteId(stranger)]


@pytest.mark.parametrize(("total", "size"), [(10, 10), (10, 5), (10, 4), (4, 1), (MILLION, 200)])
def test_lots_are_different_numbers_and_the_same_for_the_same_text(total: int, size: int) -> None:
    drawn = lots("a", total, size)
    assert len({*drawn}) == size
    assert all(0 <= number < total for number in drawn)
    assert drawn == lots("a", total, size)
    assert total < 20 or drawn != lots("b", total, size)


@pytest.mark.parametrize(("total", "size"), [(10, 6), (40, 5)])
def test_every_number_has_its_turn(total: int, size: int) -> None:
    counts = np.bincount([n for k in range(4000) for n in lots(str(k), total, size)])
    expected = 4000 * size / total
    assert (abs(counts - expected) < 5 * expected**0.5).all()


def test_hashes_of_a_user_go_on_where_they_stopped() -> None:
    users = np.array([3, 4], np.uint64)
    assert (hashes(0, users, 0, 6)[:, 2:] == hashes(0, users, 2, 4)).all()
    assert (hashes(0, users, 0, 3)[0] != hashes(0, users, 0, 3)[1]).all()


def test_a_cohort_follows_from_seed_and_round_and_the_rest_are_counted() -> None:
    users = crowd()
    assert isinstance(users, Pool)
    muster = users.muster(a_plan(), {})
    one = muster.cohort(1)
    assert one == muster.cohort(1)
    assert len({*one.asked}) == 20
    assert list(one.asked) == sorted(one.asked)
    assert one.left_out == {
        "(999980 others)": "not drawn: 20 of 1000000 sites are asked in a round"
    }
    others = [muster.cohort(2), muster.scorers(1), users.muster(a_plan(seed=1), {}).cohort(1)]
    assert all({*other.asked} != {*one.asked} for other in others)
    assert (muster.ready, muster.willing) == (MILLION, MILLION)


def test_who_refused_for_good_is_not_drawn_again() -> None:
    users = crowd(30)
    barred: dict[str, str] = {users.name(k): "over budget" for k in range(12)}
    muster = users.muster(a_plan(), barred)
    chosen = muster.cohort(1)
    assert len(chosen.asked) == 18  # all that are left
    assert not barred.keys() & {*chosen.asked}
    assert chosen.left_out == barred
    assert (muster.ready, muster.left_out) == (18, barred)


def test_a_crowd_trains_as_its_sites_would_one_by_one() -> None:
    one, other = (play(a_plan(), crowd(500), kind) for kind in (Vectorised, Inline))
    assert one.candidate is not None
    assert other.candidate is not None
    gap = one.candidate.params - other.candidate.params
    assert gap.norm() <= 1e-5 * one.candidate.params.norm()
    assert [r.asked for r in one.receipts] == [r.asked for r in other.receipts]
    assert [len(r.asked) for r in one.receipts] == [20] * 6  # scored by as many
    assert one.candidate.scores == pytest.approx(other.candidate.scores)


def test_a_private_crowd_charges_those_who_took_part() -> None:
    privacy = Privacy("record", epsilon=9.0, delta=1e-3, rounds=3, evaluation_epsilon=1.0)
    plan = a_plan(privacy=privacy, training=Training(lr=0.1, steps=2, batch_size=4))
    for receipt in play(plan, crowd()).receipts:
        assert all(0 < one.epsilon <= 9.0 for one in receipt.counted)


def test_a_round_s_memory_does_not_grow_with_the_crowd() -> None:
    peaks = []
    for size in (10**3, 10**3, MILLION, 10**9):
        tracemalloc.start()
        play(a_plan(), crowd(size))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks[2:]) < 1.5 * peaks[1]


def test_the_benchmark_s_million_users_stay_below_their_bound() -> None:
    command = [sys.executable, "-m", "benchmarks.logistic", str(MILLION), "5"]
    told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert told["peak"] < 1.5e9
    assert len(told["rounds"]) == 5
    assert told["loss"] < 0.69  # less than guessing


def test_a_crowd_is_dealt_from_a_dataset() -> None:
    users = Crowd(sites=1000, rows=5, held_out=0.2).deal(recipe(), ShippedData("breast_cancer"))
    holding = users[SiteId("user-007")]
    assert (len(holding.train), len(holding.held_out)) == (4, 1)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"sites": 0, "rows": 5}, "population.sites 0"),
        ({"sites": 10, "rows": 0}, "population.rows 0"),
        ({"sites": 10, "rows": 5, "held_out": 1.0}, "population.held_out 1.0"),
    ],
)
def test_an_impossible_crowd_is_one_line(settings: dict[str, float], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Crowd(**settings).deal(recipe(), ShippedData("breast_cancer"))  # type: ignore[arg-type]


def test_a_crowd_needs_a_dataset_and_a_cohort() -> None:
    with pytest.raises(ConfigError, match="set data"):
        Crowd(10, 5).deal(recipe(), None)
    with pytest.raises(ConfigError, match=r"cohort.size 0 asks all 1000000"):
        play(a_plan(size=0), crowd())
    named = replace(a_plan(), cohort=Cohort(quorum=1, deadline=9.0, sites=(SiteId("user-1"),)))
    with pytest.raises(ConfigError, match=r"cohort.sites"):
        play(named, crowd())
