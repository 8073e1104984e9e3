"""One fleet for all the tests of a process, for as long as it is sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.faults.fleet import Fleet


@pytest.fixture(scope="session")
def dock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Fleet]]:
    """Return what gives the fleet: the same one, or a new one when a test has left it broken."""
    with ExitStack() as stack:
        fleets: list[Fleet] = []

        def give() -> Fleet:
            if not fleets or not fleets[-1].is_sound:
                fleets.append(stack.enter_context(Fleet(tmp_path_factory.mktemp("fleet"))))
                fleets[-1].found()
            return fleets[-1]

        yield give


@pytest.fixture
def fleet(dock: Callable[[], Fleet], request: pytest.FixtureRequest) -> Iterator[Fleet]:
    """Return a fleet that is whole; a test that fails leaves it to nobody else."""
    a_fleet = dock()
    failed = request.session.testsfailed
    yield a_fleet
    a_fleet.is_sound = request.session.testsfailed == failed
