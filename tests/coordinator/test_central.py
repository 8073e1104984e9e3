"""A coordinator that is trusted with the noise, and dies between a sum and its commit."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from fedml.coordinator.journal import Journal
from fedml.errors import NoRoom, Refused
from fedml.protocol.messages import Assignment, Blob, Privacy, RunId
from fedml.protocol.operations import Receipt
from fedml.releases.registry import MemoryRegistry
from tests.coordinator import world
from tests.coordinator.world import Hub, Site

CENTRAL = Privacy("site_central", 3.0, 1e-5, clip=1.0, rounds=2)


async def hand_in(site: Site, order: Assignment) -> None:
    """Answer as a site does under site_central: an update of bounded norm and weight 1."""
    data = world.packed({"delta": world.delta(1e-3 + 1e-4 * world.SITES.index(site.name))})
    trained = replace(site.trained(order, data), weight=1.0, metrics={})
    await site.link.upload(trained.update, site.store, order.task)
    await site.send(trained)


async def test_two_draws_of_noise_over_one_sum_never_both_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with the noisy model made and not committed, it makes another, and nobody saw the
    first: subtracting the one from the other, or averaging both, is for nobody.
    """
    plan = world.plan(privacy=CENTRAL, rounds=2)
    drawn, commit = list[tuple[str, int]](), Journal.commit

    def full(
        self: Journal, run: RunId, receipt: Receipt, state: Path | None, *more: object
    ) -> None:
        assert state is not None
        drawn.append((state.name, state.stat().st_size))
        raise NoRoom("the disk is full")

    before = Hub(tmp_path / "hub", MemoryRegistry(tmp_path / "registry"))
    sites = await world.three_sites(before, tmp_path)
    run = await before.submit(plan)
    orders = [await site.order() for site in sites]
    monkeypatch.setattr(Journal, "commit", full)
    for site, order in zip(sites, orders, strict=True):
        await hand_in(site, order)
    await before.until(run, lambda info: "the disk is full" in info.detail)
    [(first, size), *again] = drawn
    assert {name for name, _ in again} <= {first}  # waiting for the disk draws no second time
    with pytest.raises(Refused):
        await sites[0].link.download(Blob(first, size), sites[0].store)
    await before.close()

    monkeypatch.setattr(Journal, "commit", commit)
    after = Hub(tmp_path / "hub", MemoryRegistry(tmp_path / "registry"))
    try:
        for site, order in zip(sites, orders, strict=True):
            await site.connect(after, order.task)
            assert await site.order() == order
            await hand_in(site, order)
        following = await asyncio.gather(*(site.order() for site in sites))
        [receipt] = after.runs.detail(run).receipts
        assert {order.model.digest for order in following} == {receipt.model} != {first}
        with pytest.raises(Refused):
            await sites[0].link.download(Blob(first, size), sites[0].store)
        assert {(one.weight, one.digest) for one in receipt.counted} == {(1.0, "")}
    finally:
        await after.close()
