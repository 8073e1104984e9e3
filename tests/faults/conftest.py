"""One fleet of a kind for all the tests of a process, for as long as it is sound."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol

import pytest

from tests.faults.fleet import GRACE, HEARTBEAT, Fleet


class Dock(Protocol):
    """Where fleets lie: it gives the same one, or a new one when a test has left it broken."""

    def __call__(self, heartbeat: float = HEARTBEAT, grace: float = GRACE) -> Fleet: ...


@pytest.fixture(scope="session")
def dock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dock]:
    """Return what gives a fleet."""
    with ExitStack() as stack:
        fleets: dict[tuple[float, float], Fleet] = {}

        def give(heartbeat: float = HEARTBEAT, grace: float = GRACE) -> Fleet:
            kind = heartbeat, grace
            if kind not in fleets or not fleets[kind].is_sound:
                fleet = Fleet(tmp_path_factory.mktemp("fleet"), heartbeat=heartbeat, grace=grace)
                fleets[kind] = stack.enter_context(fleet)
                fleet.found()
            return fleets[kind]

        yield give


@pytest.fixture
def fleet(dock: Dock, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Return a fleet that is whole; a test that fails leaves it to nobody else."""
    yield from _lent(dock(), request)


@pytest.fixture
def patient(dock: Dock, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Return a fleet that no stall of a busy machine makes take a site for lost."""
    yield from _lent(dock(heartbeat=4.0, grace=20.0), request)


def _lent(a_fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    failed = request.session.testsfailed
    yield a_fleet
    a_fleet.is_sound = request.session.testsfailed == failed
