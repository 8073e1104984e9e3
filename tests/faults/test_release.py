"""A crash while a version is released: the operator asks again, and every site serves it."""

from __future__ import annotations

import pytest

from fedml.errors import Unreachable
from tests.faults.fleet import COORDINATOR, PATIENCE, Fleet, plan

pytestmark = pytest.mark.slow


def test_a_crash_at_any_step_of_a_release_is_mended_by_asking_again(fleet: Fleet) -> None:
    """Sites that hear of it before, by coming back, take nothing but the whole release."""
    detail = fleet.finish(fleet.submit(plan(70, minted=True, rounds=1)))
    model, version = detail.info.model, detail.info.version
    for point in ("release.published", "release.promoted"):
        fleet.arm(COORDINATOR, f"{point}:1:kill")
        with pytest.raises(Unreachable):
            fleet.ask(lambda c: c.release(model, version))
        fleet.bury(COORDINATOR)
        fleet.launch(COORDINATOR)
        fleet.wait_for(COORDINATOR, lambda: fleet.ask(lambda c: c.list_runs()))
    live = fleet.ask(lambda c: c.release(model, version))
    assert (live.version, live.state) == (version, "live")

    def served() -> list[tuple[int, str, str]]:
        infos = fleet.ask(lambda c: c.list_sites())
        return [(s.version, s.digest, s.state) for info in infos for s in info.serving]

    wanted = [(version, live.digest, "live")] * len(fleet.sites)
    assert fleet.until(lambda: served() == wanted, PATIENCE), served()
