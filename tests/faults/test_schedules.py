"""Fifty schedules of crashes and more: whatever is killed, wherever, the contract holds."""

from __future__ import annotations

import pytest

from tests.faults.fleet import Fleet
from tests.faults.schedule import Tally, play, schedule

pytestmark = pytest.mark.slow
SEEDS, MINTED = range(48), range(1000, 1004)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seeded_schedule_of_faults_upholds_the_contract(fleet: Fleet, seed: int) -> None:
    play(fleet, schedule(seed), Tally())


@pytest.mark.parametrize("seed", MINTED)
def test_a_schedule_with_a_crash_on_the_way_to_the_registry(fleet: Fleet, seed: int) -> None:
    play(fleet, schedule(seed, minted=True), Tally())
