"""A site's certificate is renewed while a round is under way: nobody notices but the next dial."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from fedml.identity.certificates import Credentials, identity_in
from tests.faults.contract import keep, uphold
from tests.faults.fleet import COORDINATOR, PATIENCE, Fleet, plan
from tests.faults.schedule import Tally

pytestmark = pytest.mark.slow
SITE = "oslo"
LIFE, AGE = 36.0, 12.0  # seconds; so it is renewed 12 s from the start, and dies 12 s later


@pytest.fixture
def fleet(patient: Fleet) -> Fleet:
    return patient


@pytest.fixture
def since(fleet: Fleet) -> Iterator[int]:
    """Stop the site, and return how much it has said; afterwards it has a lasting certificate."""
    fleet.kill(SITE)
    yield len(fleet.log(SITE))
    fleet.certify(SITE, f"localhost:{fleet.port}", time.time())
    fleet.relaunch(SITE)
    fleet.until_all_are_here()


def serial(fleet: Fleet) -> int:
    """Return the serial number of the certificate in the site's folder."""
    return identity_in(Credentials.load(fleet.site(SITE) / "identity").certificate).serial


def said(fleet: Fleet, since: int, text: str) -> list[str]:
    """Return what the site said at each event of that name: its reason, or nothing."""
    lines = [json.loads(x) for x in fleet.log(SITE)[since:].splitlines() if x.startswith("{")]
    return [line.get("reason", "") for line in lines if line["event"] == text]


def test_a_certificate_is_renewed_while_a_round_is_under_way(fleet: Fleet, since: int) -> None:
    """Neither the round nor the connection ends with it, until the old certificate does."""
    a_plan, tally = plan(80, private=True, deadline=60.0), Tally()
    fleet.certify(SITE, f"localhost:{fleet.port}", time.time() - AGE, LIFE)
    old = serial(fleet)
    fleet.arm(SITE, "worker.begun:1:delay=16")  # so the round lasts longer than the certificate
    fleet.launch(SITE)
    run = fleet.submit(a_plan)
    assert fleet.until(lambda: bool(said(fleet, since, "certificate renewed")), PATIENCE), (
        fleet.log(SITE)
    )
    assert serial(fleet) != old
    kept = [keep(fleet, run)]
    assert not kept[0].rounds  # still in the first round
    assert len(said(fleet, since, "connected")) == 1  # no new dial for it
    fleet.finish(run)
    uphold(fleet, run, a_plan, kept, tally)

    def is_back() -> bool:
        """True once the old certificate's connection has ended, and the new one's is there."""
        assert fleet.is_running(SITE), fleet.log(SITE)[-2000:]
        return len(said(fleet, since, "connected")) == 2

    second = fleet.submit(again := plan(81, private=True))
    assert fleet.until(is_back, PATIENCE), fleet.log(SITE)
    [reason] = said(fleet, since, "reconnecting")
    assert "connect again with the renewed one" in reason
    fleet.finish(second)
    uphold(fleet, second, again, [], tally)
    audit = (fleet.hub / "audit.jsonl").read_text()
    assert audit.count('"renew"') == 1, audit[-2000:]
    assert tally.asked_again == 0
    assert fleet.is_running(COORDINATOR)
