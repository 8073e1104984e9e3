"""Runs wait their turn in order, start when they are due, stop and go on, over any crash."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedml import settings as files
from fedml.coordinator.host import Host
from fedml.coordinator.journal import Ended, Halted, Registered
from fedml.coordinator.runs import Runs
from fedml.coordinator.settings import Settings
from fedml.errors import ConfigError, PermissionDenied, Unreachable
from fedml.protocol.messages import Assignment, Cancel, Declined, Failed, Forget, RunId, TaskId
from fedml.protocol.operations import ModelVersion, RunInfo
from fedml.releases.registry import UNTOLD, MemoryRegistry, Story
from fedml.rounds import Evaluation, SitesChanged
from fedml.rounds.run import Run
from tests.coordinator import world
from tests.coordinator.world import GRACE, HEARTBEAT, Hub, Site, plan, who

ONE = Settings(heartbeat=HEARTBEAT, grace=GRACE, runs_at_once=1)


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    a_hub = Hub(tmp_path / "hub", MemoryRegistry(tmp_path / "registry"), ONE)
    yield a_hub
    await a_hub.close()


@pytest.fixture
async def sites(hub: Hub, tmp_path: Path) -> list[Site]:
    return await world.three_sites(hub, tmp_path)


async def play(sites: list[Site]) -> None:
    for site in sites:
        await site.answer(await site.order())


async def again(hub: Hub, tmp_path: Path) -> Hub:
    """Restart the coordinator."""
    await hub.close()
    return Hub(hub.path, MemoryRegistry(tmp_path / "registry"))


def states(infos: list[RunInfo]) -> list[tuple[str, str]]:
    return [(info.id, info.state) for info in infos]


# --- the queue ----------------------------------------------------------------------------------


async def test_runs_over_the_limit_wait_in_order_and_the_list_says_so(
    hub: Hub, sites: list[Site]
) -> None:
    runs = [await hub.submit(plan(rounds=1)) for _ in range(3)]
    await hub.until(runs[0], lambda info: info.state == "running")
    infos = list(await hub.operator.list_runs())
    assert [info.state for info in infos] == ["running", "queued", "queued"]
    assert [info.detail for info in infos[1:]] == ["next", "1 before it"]
    for run in runs:
        assert (await sites[0].order()).run == run  # none before its turn
        for site in sites[1:]:
            assert (await site.order()).run == run
        await hub.operator.stop_run(run)
        for site in sites:
            await site.next(Forget)


async def test_the_order_of_the_queue_survives_a_restart(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    first, second, third = [await hub.submit(plan()) for _ in range(3)]
    assert {(await site.order()).run for site in sites} == {first}
    hub = await again(hub, tmp_path)
    try:
        sites = await world.three_sites(hub, tmp_path)
        assert {(await site.order()).run for site in sites} == {first}
        await hub.operator.stop_run(first)
        assert {(await site.order()).run for site in sites} == {second}
        assert (await hub.operator.show_run(third)).info.state == "queued"
    finally:
        await hub.close()


async def test_a_run_that_breaks_down_makes_room_and_touches_no_other(
    tmp_path: Path,
) -> None:
    settings = replace(ONE, runs_at_once=2)
    hub = Hub(tmp_path / "hub", MemoryRegistry(tmp_path / "registry"), settings)
    try:
        sites = await world.three_sites(hub, tmp_path)
        broken, good, waiting = [await hub.submit(plan(rounds=2)) for _ in range(3)]
        orders = [{o.run: o for o in (await site.order(), await site.order())} for site in sites]
        host = hub.runs._hosts[broken]
        assert isinstance(host, Host)
        host._inbox.put_nowait("no event")  # type: ignore[arg-type]  # a bug
        await hub.until(waiting, lambda info: info.state == "running")
        assert "stands still" in (await hub.operator.show_run(broken)).info.detail
        for site, mine in zip(sites, orders, strict=True):
            await site.answer(mine[good])
        assert not (await hub.receipt(good)).missing
    finally:
        await hub.close()


async def test_refusals_and_failures_in_one_run_do_not_show_in_another(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "hub", MemoryRegistry(tmp_path / "registry"))
    try:
        sites = await world.three_sites(hub, tmp_path)
        bad, good = [await hub.submit(plan(rounds=1)) for _ in range(2)]
        for site in sites:
            for order in (await site.order(), await site.order()):
                if order.run == good:
                    await site.answer(order)
                elif site is sites[0]:
                    await site.send(Declined(order.task, "not for you"))
                else:
                    await site.send(Failed(order.task, "crashed"))
        receipt = await hub.receipt(good)
        assert (receipt.missing, len(receipt.counted)) == ({}, 3)
        assert len((await hub.receipt(bad)).missing) == 3
    finally:
        await hub.close()


async def test_runs_that_were_under_way_go_on_though_fewer_may_be_at_once_now(
    tmp_path: Path,
) -> None:
    hub = Hub(tmp_path / "hub", MemoryRegistry(tmp_path / "registry"))
    sites = await world.three_sites(hub, tmp_path)
    runs = [await hub.submit(plan()) for _ in range(2)]
    orders = [(await site.order(), await site.order()) for site in sites]
    await hub.close()
    files.write(ONE, hub.path / "coordinator.toml")
    hub = Hub(hub.path, MemoryRegistry(tmp_path / "registry"))
    try:
        for site, mine in zip(sites, orders, strict=True):
            await site.connect(hub, *(order.task for order in mine))
            assert {(await site.order()).task, (await site.order()).task} == {o.task for o in mine}
        late = await hub.submit(plan())
        assert states([hub.runs.info(run) for run in (*runs, late)])[2] == (late, "queued")
    finally:
        await hub.close()


async def test_a_site_that_is_back_before_its_run_is_does_not_throw_its_work_away(
    hub: Hub, sites: list[Site], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await hub.submit(plan())
    orders = [await site.order() for site in sites]
    await hub.close()
    arrived, load = asyncio.Event(), Runs._load

    async def slow(self: Runs, id: RunId) -> Run | None:
        await arrived.wait()
        return await load(self, id)

    monkeypatch.setattr(Runs, "_load", slow)
    hub = Hub(hub.path, MemoryRegistry(tmp_path / "registry"))
    try:
        for site, order in zip(sites, orders, strict=True):
            await site.connect(hub, order.task, TaskId(f"{run}.1.7.{site.name}"))
            assert (await site.next(Forget)).task == f"{run}.1.7.{site.name}"  # and not the other
        arrived.set()
        for site, order in zip(sites, orders, strict=True):
            assert await site.next_of(Assignment, Forget) == order
            await site.answer(order)
        assert not (await hub.receipt(run)).missing
    finally:
        await hub.close()


# --- sites that take part in few runs at once -----------------------------------------------------


class Away(MemoryRegistry):
    """A registry that nobody reaches until it is `back`."""

    back = False

    def stage(self, bundle: Path, story: Story = UNTOLD) -> ModelVersion:
        if not self.back:
            raise Unreachable("registry at db: connection refused")
        return super().stage(bundle, story)


async def test_who_waits_for_sites_does_not_wait_for_the_version_of_a_run_that_had_them(
    tmp_path: Path,
) -> None:
    registry = Away(tmp_path / "registry")
    async with world.hub(tmp_path, registry) as hub:
        sites = [Site(tmp_path, name) for name in world.SITES]
        for site in sites:
            site.hello = replace(site.hello, runs_at_once=1)
            await site.connect(hub)
        first, second = [await hub.submit(plan(rounds=1)) for _ in range(2)]
        await play(sites)
        orders = [await site.order() for site in sites]
        assert {order.run for order in orders} == {second}
        assert hub.runs.detail(first).info.state == "running"
        registry.back = True
        for site, order in zip(sites, orders, strict=True):
            await site.answer(order)
        assert [(await hub.end(run)).state for run in (first, second)] == ["done", "done"]


async def test_runs_take_turns_at_sites_that_work_for_one_run_at_a_time(
    tmp_path: Path,
) -> None:
    hub = Hub(tmp_path / "hub", MemoryRegistry(tmp_path / "registry"))
    try:
        sites = [Site(tmp_path, name) for name in world.SITES]
        for site in sites:
            site.hello = replace(site.hello, runs_at_once=1)
            await site.connect(hub)
        runs = [await hub.submit(plan(rounds=3, patience=0.05)) for _ in range(2)]
        order_of_runs = []
        for _ in range(6):
            orders = [await site.order() for site in sites]
            [run] = {order.run for order in orders}  # all three at the same one
            order_of_runs.append(run)
            for other in runs:
                if other != run and order_of_runs.count(other) < 3:
                    waiting = await hub.until(other, lambda info: "runs_at_once" in info.detail)
                    assert "it is other runs' turn (its policy runs_at_once = 1)" in waiting.detail
            if len(order_of_runs) == 2:  # the other one waits for longer than its patience
                await asyncio.sleep(0.1)
            for site, order in zip(sites, orders, strict=True):
                await site.answer(order)
        assert [order_of_runs.count(run) for run in runs] == [3, 3]
        assert all(a != b for a, b in itertools.pairwise(order_of_runs))
        for run in runs:
            assert (await hub.end(run)).state == "done"
            assert not any(r.missing for r in hub.runs.detail(run).receipts)
    finally:
        await hub.close()


async def test_a_round_that_was_open_at_a_restart_has_its_seats_before_others_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path / "hub", MemoryRegistry(tmp_path / "registry"))
    sites = [Site(tmp_path, name) for name in world.SITES]
    for site in sites:
        site.hello = replace(site.hello, runs_at_once=1)
        await site.connect(hub)
    first, second = [await hub.submit(plan()) for _ in range(2)]
    assert {(await site.order()).run for site in sites} == {first}
    loaded, load = asyncio.Event(), Runs._load

    async def slowly(runs: Runs, id: RunId) -> Run | None:
        if id == first:
            await loaded.wait()
        return await load(runs, id)

    monkeypatch.setattr(Runs, "_load", slowly)
    hub = await again(hub, tmp_path)
    try:
        sites = [Site(tmp_path, name) for name in world.SITES]
        for site in sites:
            site.hello = replace(site.hello, runs_at_once=1)
            await site.connect(hub)
        await hub.until(second, lambda info: "other runs' turn" in info.detail)
        loaded.set()
        assert {(await site.order()).run for site in sites} == {first}
    finally:
        await hub.close()


async def test_a_round_that_opens_as_patience_ends_takes_its_seats_like_any_other(
    tmp_path: Path,
) -> None:
    hub = Hub(tmp_path / "hub", MemoryRegistry(tmp_path / "registry"))
    try:
        sites = [Site(tmp_path, name) for name in world.SITES]
        for site in sites:
            site.hello = replace(site.hello, runs_at_once=1)
            await site.connect(hub)
        first = await hub.submit(plan(rounds=2, patience=0.2, evaluation=Evaluation(every=1)))
        await play(sites)
        bern, kyoto, quito = sites
        await bern.send(Declined((await bern.order()).task, "no rows held out"))
        await kyoto.send(Failed((await kyoto.order()).task, "crashed"))
        await quito.order()
        await quito.link.close()  # so the scores are waited for, and given up
        assert {(await site.order()).kind for site in (bern, kyoto)} == {"train"}
        second = await hub.submit(plan())
        turn = "other runs' turn"
        told = await hub.until(second, lambda i: turn in i.detail or i.detail.startswith("round "))
        assert turn in told.detail
        assert hub.runs.info(first).detail.startswith("round 2 of 2")
    finally:
        await hub.close()


async def test_a_site_that_is_busy_for_now_is_asked_again(hub: Hub, sites: list[Site]) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    await bern.send(Declined((await bern.order()).task, "policy runs_at_once = 1", for_now=True))
    await play(others)
    await play(sites)
    assert (await hub.receipt(run, 2)).asked == ("bern", "kyoto", "quito")


# --- the schedule -------------------------------------------------------------------------------


async def test_a_scheduled_run_starts_when_it_is_due_and_not_before(
    hub: Hub, sites: list[Site]
) -> None:
    then = time.time() + 3600
    later = await hub.submit(plan(), starts=then)
    [info] = await hub.operator.list_runs()
    assert (info.state, info.starts) == ("scheduled", then)
    now = await hub.submit(plan())  # it does not wait for the one that waits for its time
    assert (await sites[0].order()).run == now
    await hub.operator.stop_run(now)
    await hub.operator.stop_run(later)
    due = time.time() + 0.3
    run = await hub.submit(plan(), starts=due)
    order = await sites[0].order()
    assert (order.run, time.time() >= due) == (run, True)


async def test_a_schedule_survives_a_restart(hub: Hub, tmp_path: Path) -> None:
    due = time.time() + 0.5
    run = await hub.submit(plan(), starts=due)
    hub = await again(hub, tmp_path)
    try:
        sites = await world.three_sites(hub, tmp_path)
        assert (await hub.operator.show_run(run)).info.state == "scheduled"
        order = await sites[0].order()
        assert (order.run, time.time() >= due) == (run, True)
    finally:
        await hub.close()


async def test_what_was_under_way_comes_first_after_a_restart_whatever_the_clock_said(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    under_way = await hub.submit(plan())
    await sites[0].order()
    with pytest.MonkeyPatch.context() as clock:
        clock.setattr(time, "time", lambda now=time.time: now() - 7200)
        waiting = (await hub.runs.submit("admin", plan().to_json())).id  # hours before, by it
        hub = await again(hub, tmp_path)
        try:
            sites = await world.three_sites(hub, tmp_path)
            assert (await sites[0].order()).run == under_way
            assert waiting not in hub.runs._playing
        finally:
            await hub.close()


async def test_a_clock_that_was_set_back_holds_up_scheduled_runs_only(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    under_way, waiting = [await hub.submit(plan()) for _ in range(2)]
    await sites[0].order()
    with pytest.MonkeyPatch.context() as clock:
        clock.setattr(time, "time", lambda now=time.time: now() - 7200)
        hub = await again(hub, tmp_path)
        try:
            sites = await world.three_sites(hub, tmp_path)
            assert (await sites[0].order()).run == under_way
            await hub.operator.stop_run(under_way)
            assert (await sites[0].order()).run == waiting
        finally:
            await hub.close()


async def test_a_scheduled_run_can_be_stopped_and_a_time_that_is_none_is_refused(hub: Hub) -> None:
    run = await hub.submit(plan(), starts=time.time() + 3600)
    await hub.operator.stop_run(run)
    assert (await hub.end(run)).detail == "stopped by admin; 0 rounds are committed"
    with pytest.raises(ConfigError, match=r"starts 1000000000000\.0: seconds"):
        await hub.submit(plan(), starts=1e12)


# --- stop and resume ----------------------------------------------------------------------------


async def test_a_stopped_run_goes_on_from_its_last_committed_round(
    hub: Hub, sites: list[Site]
) -> None:
    run = await hub.submit(plan(rounds=2, attempts=1))
    await play(sites)
    stale = [await site.order() for site in sites]
    await hub.operator.stop_run(run)
    for site, order in zip(sites, stale, strict=True):
        assert (await site.next(Cancel)).task == order.task
    stopped = await hub.end(run)
    assert (stopped.state, stopped.round) == ("stopped", 1)
    assert (await hub.operator.resume_run(run)).state in ("queued", "waiting", "running")
    orders = [await site.order() for site in sites]
    assert {(o.round, o.model) for o in orders} == {(2, stale[0].model)}
    assert not {o.task for o in orders} & {o.task for o in stale}  # none is done twice
    for site, order in zip(sites, orders, strict=True):
        await site.answer(order)
    ended = await hub.end(run)
    assert (ended.state, ended.round, ended.version) == ("done", 2, 1)
    audit = [(e.who, e.what) for e in hub.runs._folder.audit.entries()]
    assert audit[-2:] == [("operator admin", f"stop {run}"), ("operator admin", f"resume {run}")]


async def test_a_crash_after_stop_was_noted_stops_the_run_all_the_same(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    run = await hub.submit(plan())
    stale = [await site.order() for site in sites]
    hub.runs._journal.append(Halted(run, "stopped by admin", 1.0))  # and no further
    hub = await again(hub, tmp_path)
    try:
        assert (await hub.end(run)).detail == "stopped by admin; 0 rounds are committed"
        [receipt] = hub.runs.detail(run).receipts
        assert set(receipt.missing.values()) == {"the run was stopped: stopped by admin"}
        sites = await world.three_sites(hub, tmp_path)
        await hub.operator.resume_run(run)
        hub = await again(hub, tmp_path)  # nor does a crash undo the resumption
        sites = await world.three_sites(hub, tmp_path)
        orders = [await site.order() for site in sites]
        assert not {o.task for o in orders} & {o.task for o in stale}
    finally:
        await hub.close()


async def test_a_round_that_was_open_when_its_run_failed_costs_no_attempt_when_it_is_resumed(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    run = await hub.submit(plan(rounds=1, attempts=1))
    stale = [await site.order() for site in sites]
    hub.runs._journal.append(Ended(run, "failed", "broke down"))  # with its round open
    hub = await again(hub, tmp_path)
    try:
        await hub.operator.resume_run(run)
        assert set((await hub.receipt(run)).missing.values()) == {"the run had ended"}
        hub = await again(hub, tmp_path)  # nor does it after a restart
        sites = await world.three_sites(hub, tmp_path)
        orders = [await site.order() for site in sites]
        assert not {o.task for o in orders} & {o.task for o in stale}
        for site, order in zip(sites, orders, strict=True):
            await site.answer(order)
        assert (await hub.end(run)).state == "done"
    finally:
        await hub.close()


async def test_what_a_site_keeps_for_a_round_that_lapsed_is_forgotten(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    run = await hub.submit(plan(rounds=1, attempts=1))
    stale = await sites[0].order()
    hub.runs._journal.append(Ended(run, "failed", "broke down"))  # with its round open
    hub = await again(hub, tmp_path)
    try:
        await hub.submit(plan())
        assert (await hub.operator.resume_run(run)).state == "queued"
        bern = await Site(tmp_path, "bern").connect(hub, stale.task)
        assert (await bern.next(Forget)).task == stale.task
    finally:
        await hub.close()


async def test_sites_keep_the_algorithm_s_own_state_of_a_run_that_may_be_resumed(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    stopped = await hub.submit(plan())
    await sites[0].order()
    await hub.operator.stop_run(stopped)
    await hub.end(stopped)
    bern = Site(tmp_path, "bern")
    bern.hello = replace(bern.hello, runs=(stopped, RunId("unheard-of")))
    await bern.connect(hub)
    assert (await bern.next(Forget)).run == "unheard-of"  # and not the other, which comes first


async def test_a_run_whose_parent_cannot_be_had_can_be_stopped(tmp_path: Path) -> None:
    class Away(MemoryRegistry):
        def get(self, model: str, version: int) -> ModelVersion:
            return ModelVersion(model, version, RunId("cancer-0"), "candidate", "", 0.0)

        def bundle(self, model: str, version: int) -> Path:
            raise Unreachable("registry at db: connection refused")

    hub = Hub(tmp_path / "hub", Away(tmp_path / "registry"), ONE)
    try:
        run, after = await hub.submit(plan(parent=1)), await hub.submit(plan())
        await hub.operator.stop_run(run)
        assert (await hub.end(run)).state == "stopped"
        await hub.until(after, lambda info: info.state == "waiting")
    finally:
        await hub.close()


async def test_what_is_stopped_stays_stopped_over_a_restart(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    run = await hub.submit(plan())
    await sites[0].order()
    await hub.operator.stop_run(run)
    await hub.end(run)
    other = await hub.submit(plan())
    hub = await again(hub, tmp_path)
    try:
        site = (await world.three_sites(hub, tmp_path))[0]
        assert (await site.order()).run == other
        assert (await hub.operator.show_run(run)).info.state == "stopped"
    finally:
        await hub.close()


async def test_a_failed_run_gets_new_attempts_when_it_is_resumed(
    hub: Hub, sites: list[Site]
) -> None:
    run = await hub.submit(plan(rounds=1, attempts=1))
    for site in sites:
        await site.send(Failed((await site.order()).task, "crashed"))
    assert (await hub.end(run)).state == "failed"
    await hub.operator.resume_run(run)
    await play(sites)
    assert (await hub.end(run)).state == "done"


async def test_only_what_has_ended_without_a_version_is_resumed(
    hub: Hub, sites: list[Site]
) -> None:
    run = await hub.submit(plan(rounds=1))
    await hub.until(run, lambda info: info.state == "running")
    with pytest.raises(ConfigError, match="is running; only what has ended is resumed"):
        await hub.operator.resume_run(run)
    await play(sites)
    await hub.end(run)
    with pytest.raises(ConfigError, match="has ended with a version; submit another run"):
        await hub.operator.resume_run(run)
    with pytest.raises(ConfigError, match="no run 'nope'"):
        await hub.operator.resume_run(RunId("nope"))


async def test_a_run_that_broke_down_with_its_version_noted_is_not_resumed(
    hub: Hub, tmp_path: Path
) -> None:
    run = await hub.submit(plan(rounds=1))
    hub.runs._journal.append(Registered(run, 1))
    hub.runs._journal.append(Ended(run, "failed", "broke down"))
    hub = await again(hub, tmp_path)
    try:
        with pytest.raises(ConfigError, match="has ended with a version; submit another run"):
            await hub.operator.resume_run(run)
    finally:
        await hub.close()


async def test_viewers_and_sites_neither_stop_nor_resume(hub: Hub) -> None:
    run = await hub.submit(plan())
    for role in ("viewer", "site"):
        caller = hub.coordinator.operations(who("eve", role))
        for call in (caller.stop_run, caller.resume_run):
            with pytest.raises(PermissionDenied, match=f"role '{role}' may not call Operations"):
                await call(run)
    assert not hub.runs._journal.runs[run].halted


# --- drain --------------------------------------------------------------------------------------


async def test_a_draining_coordinator_ends_its_rounds_and_opens_no_other(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    run = await hub.submit(plan())
    orders = [await site.order() for site in sites]
    draining = asyncio.create_task(hub.runs.drain(60.0))
    await asyncio.sleep(0)
    with pytest.raises(Unreachable, match="is going down; ask again when it is back"):
        await hub.submit(plan())
    for site, order in zip(sites, orders, strict=True):
        await site.answer(order)
    await draining
    assert len(hub.runs.detail(run).receipts) == 1
    assert hub.runs._journal.runs[run].opened is None
    hub = await again(hub, tmp_path)
    try:
        sites = await world.three_sites(hub, tmp_path)
        assert {(await site.order()).round for site in sites} == {2}
    finally:
        await hub.close()


async def test_a_run_that_is_loaded_during_a_drain_opens_no_round(
    hub: Hub, sites: list[Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = asyncio.Event(), Runs._load

    async def slow(self: Runs, id: RunId) -> Run | None:
        await loaded.wait()
        return await load(self, id)

    monkeypatch.setattr(Runs, "_load", slow)
    run = await hub.submit(plan())
    await hub.runs.drain(60.0)
    loaded.set()
    await hub.until(run, lambda info: info.state == "waiting")
    host = hub.runs._hosts[run]
    assert isinstance(host, Host)
    host.at_rest.clear()
    host.tell(SitesChanged(()))  # look who is here: all of them
    async with asyncio.timeout(60):
        await host.at_rest.wait()
    assert hub.runs._journal.runs[run].opened is None


async def test_a_drain_parks_what_takes_longer_than_it_may(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    run = await hub.submit(plan())
    orders = [await site.order() for site in sites]
    await hub.runs.drain(0.01)
    hub = await again(hub, tmp_path)
    try:
        for site, order in zip(sites, orders, strict=True):
            await site.connect(hub, order.task)
            assert await site.order() == order
            await site.answer(order)
        assert not (await hub.receipt(run)).missing
    finally:
        await hub.close()


async def test_a_drain_costs_no_run_that_waits_its_patience(hub: Hub, tmp_path: Path) -> None:
    run = await hub.submit(plan(patience=0.05))
    await hub.until(run, lambda info: info.state == "waiting")
    draining = asyncio.create_task(hub.runs.drain(60.0))
    await asyncio.sleep(0.2)  # longer than its patience
    await draining
    assert hub.runs.info(run).state == "waiting"


async def test_whoever_follows_a_run_in_the_queue_hears_of_a_drain(hub: Hub) -> None:
    await hub.submit(plan())
    waiting = await hub.submit(plan())
    following = hub.operator.watch_run(waiting)
    assert (await anext(following)).state == "queued"
    await hub.runs.drain(0.01)
    with pytest.raises(Unreachable, match=f"is going down; {waiting} goes on when it is back"):
        async with asyncio.timeout(60):
            while True:
                await anext(following)
