"""Updates as they come at a coordinator: tasks outlive rounds and crashes, and count once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedml.cli import receipts
from fedml.coordinator.folder import Folder, create
from fedml.coordinator.settings import Settings
from fedml.durable import dump_json
from fedml.errors import Refused
from fedml.identity.receipts import verify
from fedml.protocol.messages import Assignment, Cancel, Forget, RunId, Scored, SiteId
from fedml.protocol.secagg import Masking, Secagg
from fedml.releases.registry import MemoryRegistry
from fedml.rounds import Cohort, Evaluation, Plan
from fedml.rounds.selection import needs_each
from fedml.secagg import Member, Roster
from fedml.strategies import FedAsync, FedAvg, FedBuff, Strategy
from tests.coordinator import world
from tests.coordinator.world import GRACE, HEARTBEAT, Hub, Site, plan


def buffered(strategy: Strategy | None = None, **changes: object) -> Plan:
    kept = {"strategy": strategy or FedBuff(), "rounds": 4, **changes}
    return plan(**kept)


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    async with world.hub(tmp_path) as a_hub:
        yield a_hub


@pytest.fixture
async def sites(hub: Hub, tmp_path: Path) -> list[Site]:
    return await world.three_sites(hub, tmp_path)


def states(hub: Hub) -> set[str]:
    return {path.name for path in (hub.path / "states").iterdir()}


async def fetched(site: Site, order: Assignment) -> bytes:
    """What a site gets that asks for its order's model only now."""
    await site.link.download(order.model, site.store)
    return site.store.path(order.model.digest).read_bytes()


async def test_a_slow_site_holds_nobody_up_and_counts_late(hub: Hub, sites: list[Site]) -> None:
    bern, kyoto, quito = sites
    run = await hub.submit(buffered())
    late = await quito.order()
    for site in (bern, kyoto):
        await site.answer(await site.order())
    first = await hub.receipt(run, 1)
    assert first.carried == {"quito": late.task}
    assert hub.runs._is_open(late.task)  # what a site is told that comes back with it
    assert (await bern.next(Forget)).counted
    again = await bern.order()
    assert again.round == 2
    assert again.model != late.model
    assert await fetched(quito, late)  # though a newer model is out
    await quito.answer(late)
    await bern.answer(again)
    second = await hub.receipt(run, 2)
    assert [one.site for one in second.counted] == ["bern", "quito"]
    assert second.stale == {"quito": late.task}
    assert second.carried == {"kyoto": f"{run}.2.1.kyoto"}
    assert hub.runs._was_counted(late.task)
    assert states(hub) == {f"{run}.{number}.safetensors" for number in (1, 2)}  # one is kyoto's
    assert (await quito.next(Forget)) == Forget(late.task, True)
    assert (await quito.order()).round == 3
    told = [*receipts.lines(hub.runs.detail(run))]
    assert any("quito" in line and line.endswith("  1 round late") for line in told)
    assert any(line.split() == ["works", "on", "kyoto", "round", "2"] for line in told)
    detail = hub.runs.detail(run)
    verify(detail, Folder.open(hub.path).authority.certificate)


async def test_models_that_nobody_works_on_any_more_go(hub: Hub, sites: list[Site]) -> None:
    bern, kyoto, quito = sites
    run = await hub.submit(buffered(FedBuff(max_staleness=2)))
    late = await quito.order()
    for number in (1, 2, 3):
        for site in (bern, kyoto):
            order = await site.order()
            assert order.round == number
            await site.answer(order)
        await hub.receipt(run, number)
        assert hub.blobs.has(late.model.digest) == (number < 3)
    assert (await quito.next(Cancel)).task == late.task
    assert (await quito.next(Forget)) == Forget(late.task, False)
    assert (await quito.order()).round == 4
    assert states(hub) == {f"{run}.3.safetensors"}
    with pytest.raises(Refused):
        await fetched(quito, late)


async def begun(folder: Path, a_plan: Plan, quick: int) -> tuple[Hub, list[Site], RunId]:
    """A run whose first buffer is full: of the first `quick` sites; the last one still works."""
    hub = Hub(folder / "hub", MemoryRegistry(folder / "registry"))
    sites = await world.three_sites(hub, folder)
    run = await hub.submit(a_plan)
    for site in sites[:quick]:
        await site.answer(await site.order())
    await hub.receipt(run, 1)
    return hub, sites, run


async def told_of_two(hub: Hub, run: RunId) -> list[tuple[object, ...]]:
    await hub.receipt(run, 2)
    got = hub.runs.detail(run).receipts[:2]
    return [(r.asked, r.stale, r.carried, r.model, [c.site for c in r.counted]) for r in got]


@pytest.mark.parametrize(("strategy", "quick"), [(FedBuff(), 2), (FedAsync(), 1)])
async def test_a_crash_asks_for_the_very_same_tasks_and_counts_each_once(
    strategy: Strategy, quick: int, tmp_path: Path
) -> None:
    a_plan = buffered(strategy, cohort=Cohort(quorum=quick, deadline=60.0))
    calm, sites, run = await begun(tmp_path / "calm", a_plan, quick)
    try:
        await sites[2].answer(late := await sites[2].order())
        for site in sites[: quick - 1]:
            await site.answer(await site.order())
        expected = await told_of_two(calm, run)
    finally:
        await calm.close()
    assert expected[1][1] == {"quito": late.task}

    before, sites, run = await begun(tmp_path / "crash", a_plan, quick)
    bern, _, quito = sites
    assert await quito.order() == late
    if quick == 2:  # else it would fill the buffer, which is a commit
        await quito.answer(late)  # taken in, and lost with the coordinator
        await before.until(run, lambda info: "1 of 3 sites answered" in info.detail)
    await before.close()
    after = Hub(before.path, before.registry)
    try:
        for site in sites:
            await site.connect(after, *((late.task,) if site is quito else ()))
        assert await quito.order() == late  # to the byte, and never told to forget it
        assert await fetched(quito, late)
        await quito.answer(late)
        await quito.answer(late)
        if quick == 2:
            await bern.answer(await bern.order())
        assert await told_of_two(after, run) == expected
    finally:
        await after.close()


async def test_what_is_in_flight_outlives_a_crash_between_two_rounds(tmp_path: Path) -> None:
    a_plan = buffered(evaluation=Evaluation(every=1))
    before, sites, run = await begun(tmp_path, a_plan, 2)
    bern, kyoto, quito = sites
    late = await quito.order()
    scoring = [await bern.order(), await kyoto.order()]
    assert [one.kind for one in scoring] == ["evaluate"] * 2  # quito trains on
    await before.close()
    after = Hub(before.path, before.registry)
    try:
        for site, order in ((bern, scoring[0]), (kyoto, scoring[1]), (quito, late)):
            await site.connect(after, order.task)
            assert await site.order() == order
        await quito.answer(late)  # while the model is scored
        for site, order in ((bern, scoring[0]), (kyoto, scoring[1])):
            await site.send(Scored(order.task, {"accuracy": 8.0}, 10.0))
        await bern.answer(await bern.order())
        counted = (await after.receipt(run, 3)).counted
        assert [one.site for one in counted] == ["bern", "quito"]
    finally:
        await after.close()


async def test_a_run_that_is_stopped_calls_its_sites_back_and_may_go_on(
    hub: Hub, sites: list[Site]
) -> None:
    bern, kyoto, quito = sites
    run = await hub.submit(buffered())
    late = await quito.order()
    for site in (bern, kyoto):
        await site.answer(await site.order())
    await hub.receipt(run, 1)
    await hub.operator.stop_run(run)
    await hub.end(run)
    assert (await quito.next(Forget)).task == late.task
    await hub.operator.resume_run(run)
    order = await quito.order()
    assert (order.round, order.task) == (2, f"{run}.2.2.quito")


async def test_a_masked_order_says_of_how_few_its_sum_may_be(tmp_path: Path) -> None:
    """A buffer of three is raised to what seven sites' secure aggregation wants."""
    create(tmp_path / "hub", Settings(heartbeat=HEARTBEAT, grace=GRACE))
    names = [f"site-{number}" for number in range(7)]
    roster = Roster(tuple(Member(SiteId(n), n.ljust(32).encode()) for n in names))
    text = dump_json({member.site: member.key.hex() for member in roster.members})
    (tmp_path / "hub" / "roster.json").write_bytes(text)
    masked = buffered(
        FedBuff(buffer=3, max_staleness=0),
        secagg=Secagg("sa1"),
        cohort=Cohort(quorum=3, deadline=60.0),
    )
    async with world.hub(tmp_path) as hub:
        sites = [Site(tmp_path, name) for name in names]
        for site in sites:
            site.hello = replace(site.hello, roster=roster.digest.hex())
            await site.connect(hub)
        await hub.submit(masked)
        orders = [await site.order() for site in sites]
    assert {order.cohort for order in orders} == {4}
    assert {Masking.from_json(order.masking).threshold for order in orders} == {4}


async def test_behind_a_region_it_is_refused_with_the_way_out(tmp_path: Path) -> None:
    assert "use strategy=fedavg" in needs_each(buffered(), "south")
    assert not needs_each(plan(strategy=FedAvg()), "south")
