"""Real programs and mutual TLS, bytes packed both ways, and SIGKILL: the contract holds as ever.

The oracle knows no wire: it rounds where the plan says so, and nothing else. So a run that ends
in its bytes has lost nothing by packing, whoever was killed over it.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fedml.protocol.operations import Receipt
from fedml.rounds import Plan, Wire
from tests.faults.contract import keep, uphold
from tests.faults.fleet import COORDINATOR, PATIENCE, SITES, Fleet, plan
from tests.faults.oracle import models, undisturbed
from tests.faults.schedule import Tally

pytestmark = pytest.mark.slow
SITE = SITES[0]
DELTA = Wire(down="delta", up="zstd")
COARSE = Wire(down="bf16+delta", up="bf16+zstd")


def packed(seed: int, wire: Wire, **changes: object) -> Plan:
    return replace(plan(seed, **changes), wire=wire)  # type: ignore[arg-type]


def play(fleet: Fleet, a_plan: Plan, who: str, strike: str) -> tuple[Receipt, ...]:
    """Run a plan while a program is killed at a point, and started again; uphold the contract."""
    fleet.arm(who, strike)
    run = fleet.submit(a_plan)
    assert fleet.until(lambda: not fleet.is_armed(who), PATIENCE), f"{who} never passed {strike}"
    if "parcel.unpacked" not in strike or who == COORDINATOR:
        fleet.bury(who)
        kept = [keep(fleet, run)]
        fleet.launch(who)
    else:
        kept = []  # the worker's child died, and the site lives
    receipts = fleet.finish(run).receipts
    uphold(fleet, run, a_plan, kept, Tally())
    return receipts


@pytest.mark.parametrize("wire", [DELTA, COARSE], ids=["exact", "bf16"])
@pytest.mark.parametrize(
    "strike",
    ["parcel.packed:2:kill", "chunk.poured:4:kill", "chunk.taken:2:kill", "parcel.unpacked:6:kill",
     "round.committed:1:kill"],
)  # fmt: skip
def test_kill_the_coordinator_while_bytes_go_packed(fleet: Fleet, wire: Wire, strike: str) -> None:
    play(fleet, packed(200, wire), COORDINATOR, strike)


@pytest.mark.parametrize("wire", [DELTA, COARSE], ids=["exact", "bf16"])
@pytest.mark.parametrize(
    "strike",
    ["model.fetched:2:kill", "chunk.taken:3:kill", "chunk.poured:2:kill", "result.kept:2:kill",
     "parcel.unpacked:2:kill"],
)  # fmt: skip
def test_kill_a_site_while_bytes_go_packed(fleet: Fleet, wire: Wire, strike: str) -> None:
    play(fleet, packed(201, wire), SITE, strike)


def test_what_loses_nothing_ends_in_the_bytes_of_an_exact_run(fleet: Fleet) -> None:
    """After all that, and with a site whose models were deleted meanwhile."""
    a_plan = packed(202, DELTA, rounds=4)
    run = fleet.submit(a_plan)
    fleet.wait_for(COORDINATOR, lambda: fleet.show(run).info.round >= 1)
    shutil.rmtree(fleet.site(SITE) / "models", ignore_errors=True)
    receipts = fleet.finish(run).receipts
    exact = undisturbed(plan(202, rounds=4).to_json(), tuple(fleet.site(s) for s in SITES))
    assert models(receipts) == models(exact)
    assert [r.counted for r in receipts] == [r.counted for r in exact]

    def kept() -> list[Path]:
        return [path for site in SITES for path in (fleet.site(site) / "models").glob("*")]

    assert fleet.until(lambda: not kept(), PATIENCE), kept()  # of a run that is over nothing stays


def test_privacy_is_charged_once_for_an_update_that_is_rounded(fleet: Fleet) -> None:
    """What is kept is rounded and packed already, so what is sent again is the same bytes."""
    a_plan = packed(203, Wire(down="bf16", up="bf16"), private=True)
    play(fleet, a_plan, SITE, "update.uploaded:2:kill")
