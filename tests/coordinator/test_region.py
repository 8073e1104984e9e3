"""A tree of two levels comes to the bytes of the flat sum, whatever becomes of a region."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

from fedml.protocol.messages import Assignment, SiteId
from fedml.protocol.operations import Receipt
from fedml.releases.registry import MemoryRegistry
from fedml.rounds import Cohort, Plan
from tests.coordinator.tree import LEAVES, Tree, tree
from tests.coordinator.world import Hub, Site, plan

ALL = tuple(sorted(itertools.chain(*LEAVES.values())))


def plan_of(quorum: int = len(ALL), **changes: object) -> Plan:
    sites = tuple(map(SiteId, ALL))
    return plan(cohort=Cohort(quorum=quorum, deadline=60.0, sites=sites), **changes)


async def flat(folder: Path, a_plan: Plan, rounds: int = 2) -> list[Receipt]:
    """Return the receipts of the flat federation."""
    hub = Hub(folder / "flat", MemoryRegistry(folder / "flat-registry"))
    try:
        sites = [await Site(folder, name).connect(hub) for name in ALL]
        run = await hub.submit(a_plan)
        for _ in range(rounds):
            for site in sites:
                await site.answer(await site.order())
        return [await hub.receipt(run, number) for number in range(1, rounds + 1)]
    finally:
        await hub.close()


def timeless(receipt: Receipt) -> Receipt:
    return replace(receipt, opened=0.0, closed=0.0)


async def answer_all(grown: Tree, names: tuple[str, ...] = ALL) -> dict[str, Assignment]:
    """Let leaves answer the next order in the order of `names`."""
    orders = {name: await grown.leaves[name].order() for name in names}
    for name in names:
        await grown.leaves[name].answer(orders[name])
    return orders


async def test_a_tree_comes_to_the_flat_receipts(tmp_path: Path) -> None:
    wanted = await flat(tmp_path / "a", plan_of())
    for order in (ALL, ALL[::-1]):
        async with tree(tmp_path / order[0]) as grown:
            run = await grown.hub.submit(plan_of())
            for _ in range(2):
                await answer_all(grown, order)
            found = [await grown.hub.receipt(run, number) for number in (1, 2)]
        assert list(map(timeless, found)) == list(map(timeless, wanted))
        assert all(len(receipt.counted) == len(ALL) for receipt in found)
