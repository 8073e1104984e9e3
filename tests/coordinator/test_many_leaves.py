"""More sites than one coordinator is meant to hold, behind two regions: the flat sum's bytes."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import pytest

from fedml.coordinator.settings import Settings
from fedml.protocol import codec
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.operations import RunDetail
from fedml.protocol.tasks import Update
from fedml.releases.registry import MemoryRegistry
from fedml.rounds import Cohort
from fedml.strategies import FedAvg
from fedml.transport.chunks import BlobStore
from fedml.transport.server import _pages
from tests.coordinator.tree import Tree
from tests.coordinator.world import Hub, Site, delta, first_params, plan

LEAVES = {name: [f"{name}-{k:04}" for k in range(550)] for name in ("north", "south")}


@functools.cache
def shared(folder: Path) -> BlobStore:
    return BlobStore.in_transit(folder / "leaves", 2**24)


class Numbered(Site):
    """A leaf whose number sets its update apart; all keep theirs in one folder."""

    def make_store(self, folder: Path) -> BlobStore:
        return shared(folder)

    @property
    def value(self) -> float:
        number = int(self.name.rpartition("-")[2]) + (self.name > "p") * 0.5
        return (number - 300.0) / 37


@pytest.mark.timeout(240)
@pytest.mark.slow
async def test_eleven_hundred_leaves_count_each_once(tmp_path: Path) -> None:
    hub = Hub(
        tmp_path / "hub", MemoryRegistry(tmp_path / "registry"), Settings(heartbeat=30, grace=60)
    )
    grown = Tree(tmp_path, hub, Numbered)
    try:
        async with asyncio.timeout(200):
            await grown.grow(LEAVES, patience=120)
            sites = len(grown.leaves)
            run = await hub.submit(plan(cohort=Cohort(quorum=sites, deadline=200.0)))
            orders = {name: await site.order() for name, site in grown.leaves.items()}
            for name, site in grown.leaves.items():
                await site.answer(orders[name])
            receipt = await hub.receipt(run)
            detail = await hub.operator.show_run(run)
    finally:
        await grown.close()
        await hub.close()
    assert sites == 1100
    assert [counted.site for counted in receipt.counted] == sorted(grown.leaves)
    assert receipt.model == flat(grown)
    pages = [page async for page in _pages(_there(detail))]
    assert [len(codec.encode(page)) < codec.MAX_MESSAGE for page in pages] == [True] * len(pages)


def flat(grown: Tree) -> str:
    """Return the digest of what all updates come to in one reduction."""
    strategy = FedAvg()
    reduction = strategy.reducer.start()
    for name, leaf in grown.leaves.items():
        assert isinstance(leaf, Numbered)
        weight = 1.0 + len(name)
        reduction.add(Update(TaskId(name), 1, SiteId(name), delta(leaf.value), weight))
    state = strategy.advance(strategy.start(first_params()), reduction.result())
    return state.params.digest()


async def _there(detail: RunDetail) -> RunDetail:
    return detail
