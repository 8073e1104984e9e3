"""A site's clock is wrong by hours: nothing of a run depends on it, and the site says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.clocks import WrongClock
from tests.faults.contract import keep, uphold
from tests.faults.fleet import COORDINATOR, PATIENCE, SITES, Fleet, plan
from tests.faults.schedule import Tally
from tests.faults.test_versions import await_line

pytestmark = pytest.mark.slow
SITE, HOUR = SITES[1], 3600
SLOW = "this machine's clock is at least "
EXPIRED = "the certificate of site oslo expired 370 days ago, if this machine's clock is right"


@pytest.fixture
def fleet(patient: Fleet) -> Fleet:
    return patient


@pytest.fixture
def clock(fleet: Fleet, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[WrongClock]:
    """Return a clock for the site, which is right so far, and in the end."""
    clock = WrongClock(tmp_path / "clock")
    if not getattr(clock, request.param)():
        missing = {"by_libfaketime": "libfaketime", "by_shim": "a C compiler"}[request.param]
        pytest.skip(f"{missing} is not installed; the same is tested by other ways")
    yield clock
    clock.set(0)
    fleet.first.pop(SITE, None)
    fleet.until_all_are_here()


def start(fleet: Fleet, clock: WrongClock) -> None:
    """Start the site anew, with that clock, and look only at what it says from now on."""
    if clock.path is not None:
        fleet.first[SITE] = clock.path
    fleet.kill(SITE)
    fleet.news(SITE)
    fleet.launch(SITE, **clock.environment)


def start_right(fleet: Fleet, clock: WrongClock) -> None:
    """Start the site anew, and have it here; its clock may then jump."""
    start(fleet, clock)
    fleet.until_all_are_here()


@pytest.mark.parametrize(
    ("clock", "hours"), [("by_shim", 5), ("by_shim", -5), ("by_python", 5)], indirect=["clock"]
)
def test_a_clock_that_jumps_during_a_round_changes_nothing_of_the_run(
    fleet: Fleet, clock: WrongClock, hours: int
) -> None:
    """Rounds, deadlines, ledger: all as with a right clock, and to the same bytes."""
    a_plan, tally = plan(100 + hours, private=hours > 0), Tally()
    start_right(fleet, clock)
    fleet.arm(SITE, "worker.begun:1:delay=0.5")
    run = fleet.submit(a_plan)
    assert fleet.until(lambda: not fleet.is_armed(SITE), PATIENCE)
    clock.set(hours * HOUR)
    fleet.finish(run)
    uphold(fleet, run, a_plan, [], tally)
    assert tally.asked_again == 0


@pytest.mark.parametrize("clock", ["by_shim", "by_python"], indirect=True)
def test_a_site_whose_clock_is_fast_comes_back_with_it_and_says_by_how_much(
    fleet: Fleet, clock: WrongClock
) -> None:
    a_plan, tally = plan(110), Tally()
    start_right(fleet, clock)
    run = fleet.submit(a_plan)
    clock.set(5 * HOUR)
    fleet.relaunch(COORDINATOR)
    await_line(fleet, SITE, "this machine's clock is 5 h 0 min ahead of the coordinator's; set it")
    fleet.finish(run)
    uphold(fleet, run, a_plan, [], tally)


@pytest.mark.parametrize("clock", ["by_shim"], indirect=True)
def test_a_clock_that_denies_the_coordinator_is_named_and_the_site_is_back_once_it_is_right(
    fleet: Fleet, clock: WrongClock
) -> None:
    """The coordinator was started, and certified, in what is the site's future."""
    a_plan, tally = plan(120), Tally()
    start_right(fleet, clock)
    run = fleet.submit(a_plan)
    clock.set(-5 * HOUR)
    kept = [keep(fleet, run)]
    fleet.relaunch(COORDINATOR)
    await_line(fleet, SITE, "this machine's clock is 5 h 0 min behind the coordinator's; set it")
    assert fleet.is_running(SITE)
    clock.set(0)
    fleet.finish(run)
    uphold(fleet, run, a_plan, kept, tally)


@pytest.mark.parametrize(
    ("clock", "seconds", "line"),
    [
        ("by_libfaketime", -5 * HOUR, SLOW),
        ("by_shim", -5 * HOUR, SLOW),
        ("by_shim", 400 * 24 * HOUR, EXPIRED),
    ],
    indirect=["clock"],
)
def test_a_site_that_starts_with_a_wrong_clock_says_what_it_can_know_and_keeps_trying(
    fleet: Fleet, clock: WrongClock, seconds: int, line: str
) -> None:
    clock.set(seconds)
    start(fleet, clock)
    await_line(fleet, SITE, line)
    assert fleet.is_running(SITE)
    clock.set(0)
    fleet.until_all_are_here()
