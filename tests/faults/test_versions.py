"""Programs of two versions in one federation: minor ones work together, major ones say why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedml.errors import Untrusted
from fedml.rounds import Wire
from tests.faults.contract import uphold
from tests.faults.fleet import COORDINATOR, PATIENCE, SITES, Fleet, plan
from tests.faults.oracle import models, undisturbed
from tests.faults.schedule import Tally
from tests.faults.versions import USED, edition, newer, older

pytestmark = pytest.mark.slow
SITE = SITES[1]


def back_to_this_version(fleet: Fleet, name: str) -> None:
    del fleet.first[name]
    fleet.relaunch(name)
    fleet.until_all_are_here()


@pytest.mark.parametrize("who", [SITE, COORDINATOR])
@pytest.mark.parametrize("change", [older, newer])
def test_an_older_and_a_newer_minor_version_work_beside_this_one(
    patient: Fleet, tmp_path: Path, who: str, change: Callable[[str], str]
) -> None:
    """Older: it lacks the newest fields. Newer: it has fields and kinds of messages we do not."""
    fleet = patient
    fleet.first[who] = version = edition(tmp_path / "version", change)
    fleet.relaunch(who)
    fleet.until_all_are_here()
    before = {name: len(fleet.log(name)) for name in (COORDINATOR, *SITES)}
    a_plan, tally = plan(90, private=who == SITE, rounds=2), Tally()
    run = fleet.submit(a_plan)
    receipts = fleet.finish(run).receipts
    assert [sorted(one.site for one in r.counted) for r in receipts] == [sorted(SITES)] * 3
    for name, start in before.items():
        said = fleet.log(name)[start:]
        assert '"level": "error"' not in said and "connected" not in said, said
    uphold(fleet, run, a_plan, [], tally)
    assert tally.asked_again == 0
    assert (version / USED).exists()
    back_to_this_version(fleet, who)


@pytest.mark.parametrize("who", [SITE, COORDINATOR])
@pytest.mark.parametrize(
    "wire", [Wire(down="delta", up="zstd"), Wire(down="bf16+delta", up="bf16+zstd")]
)
def test_a_version_that_packs_nothing_is_sent_and_sends_everything_whole(
    patient: Fleet, tmp_path: Path, who: str, wire: Wire
) -> None:
    """The words came later than `older`, and the models are the same: packing is an offer.

    What such a site sends is not rounded yet, and its receipt names what it has sent.
    """
    fleet = patient
    fleet.first[who] = version = edition(tmp_path / "version", older)
    fleet.relaunch(who)
    fleet.until_all_are_here()
    a_plan = replace(plan(92, rounds=2), wire=wire)
    receipts = fleet.finish(fleet.submit(a_plan)).receipts
    folders = tuple(fleet.site(site) for site in SITES)
    assert models(receipts) == models(undisturbed(a_plan.to_json(), folders))
    assert [receipt.attempt for receipt in receipts] == [1, 1, 1]
    assert (version / USED).exists()
    back_to_this_version(fleet, who)


def test_a_site_of_another_major_version_is_refused_and_both_ends_say_what_to_do(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.first[SITE] = edition(tmp_path / "version", str, major=2)
    for name in (COORDINATOR, SITE):
        fleet.news(name)
    fleet.relaunch(SITE)
    await_line(fleet, SITE, "you speak fedml.v2, this coordinator fedml.v1 (it is fedml ")
    await_line(fleet, COORDINATOR, "site oslo speaks fedml.v2, this coordinator fedml.v1: install")
    assert fleet.is_running(SITE)  # it serves on, and comes in once the coordinator is upgraded
    back_to_this_version(fleet, SITE)


def test_a_coordinator_of_another_major_version_is_told_by_sites_and_operators(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.first[COORDINATOR] = edition(tmp_path / "version", str, major=2)
    for name in SITES:
        fleet.news(name)
    fleet.relaunch(COORDINATOR)
    for name in SITES:
        await_line(fleet, name, "you speak fedml.v1, this coordinator fedml.v2 (it is fedml ")
    with pytest.raises(Untrusted, match="install one major version on both"):
        fleet.ask(lambda c: c.list_runs())
    back_to_this_version(fleet, COORDINATOR)  # and the sites are back by themselves


def await_line(fleet: Fleet, name: str, line: str) -> None:
    """Return once a program has said something; each looks at what is new."""
    said = ""

    def is_said() -> bool:
        nonlocal said
        said += fleet.news(name)
        return line in said

    assert fleet.until(is_said, PATIENCE), said
