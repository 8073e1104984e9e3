"""kill -9 of a region in any phase: the round goes on, to the flat run's bytes and receipts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.contract import uphold
from tests.faults.fleet import COORDINATOR, PATIENCE
from tests.faults.grove import LEAVES, REGIONS, Grove, plan
from tests.faults.schedule import Tally

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def grove(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grove]:
    with Grove(tmp_path_factory.mktemp("grove")) as a_grove:
        yield a_grove.grow()


def play(
    grove: Grove, seed: int, *, private: bool = False, who: str = "", strike: str = ""
) -> None:
    """Play a run in which one program is killed at a point and started again; it is sound."""
    a_plan = plan(seed, private=private)
    if who:
        grove.arm(who, f"{strike}:kill")
    run = grove.submit(a_plan)
    if who:
        struck = grove.until(lambda: not grove.is_armed(who), PATIENCE)
        assert struck, f"{who} never came to {strike}: {grove.show(run).info}"
        grove.bury(who)
        grove.launch(who)
    detail = grove.finish(run)
    uphold(grove, run, a_plan, [], Tally())
    assert {receipt.attempt for receipt in detail.receipts} == {1}  # no round was lost for it
    for receipt in detail.receipts:
        assert [counted.site for counted in receipt.counted] == sorted(LEAVES)
    shares = [grove.region(name) / "shares" for name in REGIONS]

    def left() -> list[str]:
        return [path.name for folder in shares for path in folder.iterdir()]

    assert grove.until(lambda: not left(), PATIENCE), left()


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_leaves_behind_regions_come_to_the_bytes_of_the_flat_run(
    grove: Grove, private: bool
) -> None:
    play(grove, 100 + private, private=private)


@pytest.mark.parametrize(
    "strike",
    [
        "orders.noted:1",  # asked, and none of its leaves was
        "task.assigned:2",  # one leaf trains
        "chunk.taken:5",  # an update, or the model, on its way in
        "update.read:1",
        "update.read:2",  # one leaf's update is summed
        "sum.kept:1",
        "chunk.poured:8",  # the model on its way down, or the sum on its way up
        "sum.uploaded:1",
        "sum.uploaded:2",
        "task.forgotten:1",  # one leaf was told that the round is over
    ],
)
def test_a_region_is_killed(grove: Grove, strike: str) -> None:
    play(grove, 110, who="north", strike=strike)


@pytest.mark.parametrize("strike", ["update.read:2", "sum.uploaded:2", "task.forgotten:2"])
def test_a_region_is_killed_and_no_leaf_pays_twice(grove: Grove, strike: str) -> None:
    play(grove, 120, private=True, who="north", strike=strike)


@pytest.mark.parametrize(
    ("who", "strike"),
    [
        (COORDINATOR, "update.read:1"),
        (COORDINATOR, "round.committed:1"),
        ("bern", "work.charged:1"),
        ("oslo", "update.announced:1"),
    ],
)
def test_those_above_and_below_a_region_are_killed(grove: Grove, who: str, strike: str) -> None:
    play(grove, 130, private=who == "bern", who=who, strike=strike)
