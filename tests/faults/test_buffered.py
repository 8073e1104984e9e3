"""Real programs, one site slow, and SIGKILL while its task is carried over: it counts once.

Who fills a buffer depends on who is quick, so no oracle knows it beforehand. But each model must
follow, to the byte, from those that its receipt names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from fedml.protocol.messages import SiteId
from fedml.rounds import Cohort, Plan
from fedml.strategies import FedBuff
from tests.faults.contract import keep, uphold
from tests.faults.fleet import COORDINATOR, PATIENCE, SITES, Fleet, plan
from tests.faults.schedule import Tally

pytestmark = pytest.mark.slow
QUICK, SLOW = SITES


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A fleet whose policies allow steps that are made of one site's update."""
    with Fleet(tmp_path_factory.mktemp("buffered")) as fleet:
        fleet.make()
        for site in SITES:
            path = fleet.site(site) / "policy.toml"
            text = path.read_text()
            assert "minimum_cohort = 2" in text
            path.write_text(text.replace("minimum_cohort = 2", "minimum_cohort = 1"))
        for name in fleet.programs:
            fleet.launch(name)
        fleet.until_all_are_here()
        yield fleet


def buffered(seed: int, rounds: int) -> Plan:
    """A step for every update, however late."""
    return replace(
        plan(seed, rounds=rounds),
        strategy=FedBuff(buffer=1, staleness=0.5, max_staleness=rounds),
        cohort=Cohort(quorum=1, deadline=PATIENCE, sites=tuple(map(SiteId, SITES))),
    )


def play(fleet: Fleet, a_plan: Plan, who: str, strike: str) -> None:
    """Have one site dawdle over its first task, kill a program meanwhile, and let all go on."""
    fleet.arm(SLOW, "worker.begun:1:delay=1.5")
    if who == COORDINATOR:
        fleet.arm(who, strike)
    run = fleet.submit(a_plan)
    if who != COORDINATOR:  # once its one strike is over
        assert fleet.until(lambda: not fleet.is_armed(SLOW), PATIENCE)
        fleet.arm(who, strike)
    assert fleet.until(lambda: not fleet.is_armed(who), PATIENCE), f"{who} never passed {strike}"
    fleet.bury(who)
    kept = [keep(fleet, run)]
    if who == COORDINATOR:
        fleet.disarm(SLOW)
        fleet.arm(QUICK, "worker.begun:1:delay=4")  # so that the other comes first
    fleet.launch(who)
    receipts = fleet.finish(run).receipts
    fleet.disarm(QUICK)
    late = f"{run}.1.1.{SLOW}"
    if who == COORDINATOR:
        assert any(receipt.carried.get(SLOW) == late for receipt in receipts)
        assert [r.stale[SLOW] for r in receipts if SLOW in r.stale].count(late) == 1
    uphold(fleet, run, a_plan, kept, Tally())


@pytest.mark.parametrize("strike", ["round.committed:3:kill", "journal.state:3:kill"])
def test_kill_the_coordinator_while_a_task_is_carried_over(fleet: Fleet, strike: str) -> None:
    play(fleet, buffered(300, 8), COORDINATOR, strike)


@pytest.mark.parametrize("strike", ["result.kept:1:kill", "update.uploaded:1:kill"])
def test_kill_the_slow_site_while_its_task_is_carried_over(fleet: Fleet, strike: str) -> None:
    play(fleet, buffered(301, 40), SLOW, strike)
