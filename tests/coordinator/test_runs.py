"""Runs go on with those who answer well, and over restarts, to the same bytes."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedml import failpoints
from fedml.cli.card import card_of
from fedml.coordinator.settings import Settings
from fedml.errors import ConfigError, Contradiction, Refused, Unreachable
from fedml.params import Params
from fedml.protocol.messages import (
    Cancel,
    Declined,
    Failed,
    Forget,
    Privacy,
    RecipeId,
    RunId,
    TaskId,
)
from fedml.protocol.operations import ModelVersion
from fedml.protocol.secagg import Secagg
from fedml.releases.manifest import Manifest
from fedml.releases.registry import UNTOLD, MemoryRegistry, Story
from fedml.rounds import Cohort
from fedml.rounds.selection import SiteStatus
from fedml.strategies import FedAvg, Moon
from fedml.strategies.robust import Median
from tests.coordinator import world
from tests.coordinator.world import GRACE, Hub, Site, delta, packed, plan

ROBUST = {
    "strategy": FedAvg(reducer=Median(f=1)),
    "cohort": Cohort(quorum=3, deadline=60.0),
}


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    async with world.hub(tmp_path) as a_hub:
        yield a_hub


@pytest.fixture
async def sites(hub: Hub, tmp_path: Path) -> list[Site]:
    return await world.three_sites(hub, tmp_path)


async def play(sites: list[Site]) -> None:
    """Let every site answer the next order well."""
    for site in sites:
        await site.answer(await site.order())


async def test_a_round_counts_every_good_update(hub: Hub, sites: list[Site]) -> None:
    run = await hub.submit(plan())
    await play(sites)
    receipt = await hub.receipt(run)
    assert [counted.site for counted in receipt.counted] == ["bern", "kyoto", "quito"]
    assert [counted.epsilon for counted in receipt.counted] == [0.25] * 3
    assert not receipt.missing
    weights = [1.0 + len(site.name) for site in sites]
    mean = sum(w * s.value for w, s in zip(weights, sites, strict=True)) / sum(weights)
    state = hub.runs._journal.state(run)  # what the next round starts from
    assert state is not None
    assert state.params["1.bias"].tolist() == pytest.approx([mean, mean], abs=1e-6)
    assert receipt.model == state.params.digest()


async def test_a_robust_round_takes_the_middle_and_its_receipt_names_who_was_clipped(
    hub: Hub, sites: list[Site]
) -> None:
    run = await hub.submit(plan(**ROBUST))
    await play(sites)
    receipt = await hub.receipt(run)
    state = hub.runs._journal.state(run)
    assert state is not None
    assert state.params["1.bias"].tolist() == pytest.approx([1e-3, 1e-3], abs=1e-9)
    assert len(receipt.counted) == 3
    assert "its norm" in receipt.damped["quito"]
    assert [r.damped for r in hub.runs._journal.runs[run].receipts] == [receipt.damped]


# --- bad inputs ---------------------------------------------------------------------------------


def spoiled(name: str, value: torch.Tensor) -> bytes:
    return packed({"delta": Params({**delta(1.0), name: value})})


def renamed() -> bytes:
    tensors = dict(delta(1.0))
    return packed({"delta": Params({**tensors, "extra": torch.zeros(1)})})


def with_slots() -> bytes:
    return packed({"delta": delta(1.0), "control": delta(1.0)})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (spoiled("1.bias", torch.tensor([0.0, float("nan")])), "its norm is nan: training"),
        (spoiled("1.bias", torch.tensor([0.0, float("inf")])), "its norm is inf: training"),
        (spoiled("1.bias", torch.zeros(3)), "1.bias: shape (3,), expected (2,)"),
        (spoiled("1.bias", torch.zeros(2).double()), "1.bias: dtype torch.float64, expected"),
        (renamed(), "names differ: ['extra']"),
        (with_slots(), "it has slots ['control'], rule plain reports []"),
        (packed({"other": delta(1.0)}), "an update without a delta: ['other']"),
        (packed({"delta": delta(1.0)})[:-4], "tensors take"),
        (b"\x80\x04pickle", "update refused: a header of"),
        (b"", "0 bytes are no safetensors file"),
    ],
)
async def test_a_bad_update_is_left_out_and_the_receipt_says_why(
    hub: Hub, sites: list[Site], data: bytes, reason: str
) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    await bern.answer(await bern.order(), data)
    await play(others)
    receipt = await hub.receipt(run)
    assert reason in receipt.missing["bern"]
    assert [counted.site for counted in receipt.counted] == ["kyoto", "quito"]
    assert receipt.model


async def test_an_update_over_its_size_is_refused_at_the_door(hub: Hub, sites: list[Site]) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    order = await bern.order()
    most = 2 * order.model.size + 2**20
    with pytest.raises(Refused, match=f"bern offers {most + 1} bytes; at most {most} bytes are"):
        await bern.answer(order, bytes(most + 1))
    await bern.send(bern.trained(order, bytes(most + 1)))  # and says it were there
    assert (await bern.order()) == order  # asked once more, for it may have been a mishap
    await bern.send(bern.trained(order, bytes(most + 1)))
    await play(others)
    assert (
        "is not here; it was deleted or never arrived" in ((await hub.receipt(run)).missing["bern"])
    )


async def test_a_site_cannot_fill_the_disk_with_updates(hub: Hub, sites: list[Site]) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    order = await bern.order()
    with pytest.raises(Refused, match="it has offered 3 others for this task"):
        for number in range(10):
            trained = bern.trained(order, b"%d" % number)
            await bern.link.upload(trained.update, bern.store, order.task)
    await bern.send(Failed(order.task, "enough"))
    await play(others)
    await hub.receipt(run)
    await bern.next(Forget)
    kept = {path.name for path in hub.blobs.folder.iterdir()}
    assert kept == {(await bern.order()).model.digest}  # only the next round's model


async def test_an_answer_to_another_round_changes_nothing(hub: Hub, sites: list[Site]) -> None:
    run = await hub.submit(plan())
    orders = [await site.order() for site in sites]
    for site, order in zip(sites, orders, strict=True):
        await site.answer(order)
    bern, *others = sites
    await bern.order()  # of round 2
    await bern.send(bern.trained(orders[0]))  # a late copy of round 1's answer
    await bern.link.close()
    await play(others)
    receipt = await hub.receipt(run, 2)
    assert receipt.missing == {"bern": f"away for more than {GRACE:g} s"}


async def test_a_stranger_hands_in_nothing_and_gets_nothing(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    stranger = await Site(tmp_path, "mallory").connect(hub)
    names = tuple(site.name for site in sites)
    run = await hub.submit(plan(cohort=Cohort(quorum=2, deadline=60.0, sites=names)))
    orders = [await site.order() for site in sites]
    with pytest.raises(Refused, match=f"blob {orders[0].model.digest[:12]} is not for mallory"):
        await stranger.link.download(orders[0].model, stranger.store)
    with pytest.raises(Refused, match=r"mallory offers \d+ bytes; no update is expected"):
        await stranger.answer(orders[0])
    await stranger.send(stranger.trained(orders[0]))
    await stranger.send(Declined(orders[1].task, "in the name of another"))
    for site, order in zip(sites, orders, strict=True):
        await site.answer(order)
    receipt = await hub.receipt(run)
    assert receipt.left_out == {"mallory": "not among the plan's sites"}
    assert not receipt.missing
    assert len(receipt.counted) == 3


async def test_an_update_delivered_twice_counts_once(hub: Hub, sites: list[Site]) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    order = await bern.order()
    await bern.answer(order)
    await bern.answer(order)
    await bern.answer(order, packed({"delta": delta(9.0)}))  # nor does a second thought
    await play(others)
    receipt = await hub.receipt(run)
    assert [counted.site for counted in receipt.counted] == ["bern", "kyoto", "quito"]
    assert receipt.counted[0].digest == bern.trained(order).update.digest


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (lambda task: Failed(task, "out of\nmemory\x1b[2J" + "!" * 9999), "out of memory [2J!!!"),
        (lambda task: Declined(task, "policy says no"), "policy says no"),
    ],
)
async def test_a_site_that_will_not_or_cannot_is_named_in_one_short_line(
    hub: Hub,
    sites: list[Site],
    event: Callable[[TaskId], Failed | Declined],
    reason: str,
) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    await bern.send(event((await bern.order()).task))
    await play(others)
    said = (await hub.receipt(run)).missing["bern"]
    assert said.startswith(reason)
    assert len(said) <= 300
    assert said.isprintable()


async def test_a_site_that_declines_is_not_asked_again(hub: Hub, sites: list[Site]) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    await bern.send(Declined((await bern.order()).task, "over budget"))
    await play(others)
    await play(others)
    receipt = await hub.receipt(run, 2)
    assert receipt.asked == ("kyoto", "quito")
    assert receipt.left_out == {"bern": "over budget"}


async def test_a_site_that_failed_is_asked_again(hub: Hub, sites: list[Site]) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    await bern.send(Failed((await bern.order()).task, "crashed"))
    await play(others)
    await play(sites)
    assert (await hub.receipt(run, 2)).asked == ("bern", "kyoto", "quito")


async def test_a_site_that_vanishes_costs_the_grace_and_no_more(
    hub: Hub, sites: list[Site]
) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    await bern.order()
    await bern.link.close()
    await play(others)
    assert (await hub.receipt(run)).missing == {"bern": f"away for more than {GRACE:g} s"}


async def test_metrics_that_would_swell_the_receipts_are_refused(
    hub: Hub, sites: list[Site]
) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    order = await bern.order()
    trained = bern.trained(order)
    await bern.link.upload(trained.update, bern.store, order.task)
    too_many = {f"m{number}": 1.0 for number in range(65)}
    await bern.send(replace(trained, metrics=too_many))
    await play(others)
    assert "it has 65 metrics" in (await hub.receipt(run)).missing["bern"]


# --- plans --------------------------------------------------------------------------------------


async def test_a_contradictory_plan_is_refused_with_all_its_reasons(hub: Hub) -> None:
    raw = json.loads(plan().to_json())
    raw["rounds"], raw["cohort"]["size"], raw["attempts"] = 0, 1, 0
    with pytest.raises(ConfigError) as caught:
        await hub.operator.submit(json.dumps(raw))
    for reason in ("rounds 0", "attempts 0", "cohort.quorum 2 is above cohort.size 1"):
        assert reason in str(caught.value)
    assert not await hub.operator.list_runs()
    with pytest.raises(Contradiction):
        plan(rounds=0)


async def test_a_plan_whose_sites_share_the_noise_is_refused_without_masks(hub: Hub) -> None:
    shared = Privacy("record_distributed", 3.0, 1e-5, rounds=3, sharers=2)
    with pytest.raises(ConfigError, match="without secure aggregation a coordinator sees it"):
        await hub.operator.submit(plan(privacy=shared).to_json())
    masked = plan(
        privacy=shared, secagg=Secagg("sa1"), cohort=Cohort(quorum=3, deadline=60.0)
    )  # which goes on to what masks want
    with pytest.raises(ConfigError, match=r"secagg=sa1 and no .*roster\.json"):
        await hub.operator.submit(masked.to_json())
    assert not await hub.operator.list_runs()


async def test_a_run_that_its_model_cannot_bear_fails_before_a_site_is_asked(
    hub: Hub, sites: list[Site]
) -> None:
    run = await hub.submit(plan(strategy=Moon()))  # breast cancer's model is linear
    ended = await hub.end(run)
    assert (ended.state, ended.round) == ("failed", 0)
    assert "with a model of 1 layer (it has 1.bias, 1.weight alone)" in ended.detail
    assert "use strategy=fedavg" in ended.detail
    assert not hub.runs.detail(run).receipts
    good = await hub.submit(plan())
    assert {(await site.order()).run for site in sites} == {good}  # nothing came before it


async def test_a_recipe_that_the_coordinator_lacks_or_has_otherwise_is_refused(hub: Hub) -> None:
    with pytest.raises(Refused, match="no recipe 'poetry' here; there are breast_cancer"):
        await hub.submit(plan(recipe=RecipeId("poetry", "ab" * 32)))
    with pytest.raises(ConfigError, match="the plan names abababababab, this coordinator has"):
        await hub.submit(plan(recipe=RecipeId("breast_cancer", "ab" * 32)))
    assert not await hub.operator.list_runs()


async def test_a_parent_that_does_not_exist_is_refused(hub: Hub) -> None:
    with pytest.raises(ConfigError, match="no version 7 of model 'cancer' is registered"):
        await hub.submit(plan(parent=7))
    assert not await hub.operator.list_runs()


async def test_a_run_that_does_not_exist_is_named_with_those_that_do(hub: Hub) -> None:
    for call in (hub.operator.show_run, hub.operator.stop_run):
        with pytest.raises(ConfigError, match="no run 'nope'; there are none"):
            await call(RunId("nope"))


async def test_plans_that_come_at_once_are_runs_of_their_own(hub: Hub) -> None:
    calls = [asyncio.create_task(hub.operator.submit(plan().to_json())) for _ in range(5)]
    with hub.runs._journal._mutex:  # the disk is slow just now
        for _ in range(10):
            await asyncio.sleep(0)
    infos = await asyncio.gather(*calls)
    assert {info.id for info in infos} == {f"cancer-{number}" for number in range(1, 6)}
    assert len(hub.runs.all()) == 5


async def test_a_run_can_be_stopped_before_it_is_under_way(hub: Hub) -> None:
    info = await hub.operator.submit(plan().to_json())  # the press is at work for seconds
    await hub.operator.stop_run(info.id)
    ended = await hub.end(info.id)
    assert (ended.state, ended.detail) == ("stopped", "stopped by admin; 0 rounds are committed")


async def test_stopping_a_run_takes_its_tasks_back(hub: Hub, sites: list[Site]) -> None:
    run = await hub.submit(plan())
    orders = [await site.order() for site in sites]
    await hub.operator.stop_run(run)
    for site, order in zip(sites, orders, strict=True):
        assert (await site.next(Cancel)).task == order.task
        assert await site.next(Forget) == Forget(order.task, counted=False)
    assert (await hub.end(run)).state == "stopped"
    assert not list(hub.blobs.folder.iterdir())


# --- runs side by side --------------------------------------------------------------------------


async def test_runs_with_equal_models_and_updates_do_not_take_each_other_s_blobs(
    hub: Hub, sites: list[Site]
) -> None:
    runs = [await hub.submit(plan()), await hub.submit(plan())]
    both = [{o.run: o for o in (await site.order(), await site.order())} for site in sites]
    orders = [[mine[RunId(run)] for mine in both] for run in runs]  # they come in any order
    assert orders[0][0].model == orders[1][0].model  # both start from the same parameters
    for site, order in zip(sites, orders[0], strict=True):
        await site.answer(order)
    await hub.receipt(runs[0])
    for site, order in zip(sites, orders[1], strict=True):
        await site.link.download(order.model, site.store)
        await site.answer(order)
    receipt = await hub.receipt(runs[1])
    assert not receipt.missing
    assert receipt.model == (await hub.receipt(runs[0])).model


async def test_an_update_that_was_folded_in_is_let_go_and_not_asked_for_again(
    hub: Hub, sites: list[Site]
) -> None:
    run = await hub.submit(plan())
    orders = [await site.order() for site in sites]
    model = orders[0].model.digest
    bern, kyoto, quito = sites
    trained = await bern.answer(orders[0])
    await hub.until(run, lambda info: "1 of 3 sites answered" in info.detail)
    await until(lambda: {path.name for path in hub.blobs.folder.iterdir()} == {model})
    await bern.link.close()
    await bern.connect(hub, orders[0].task)
    await bern.link.upload(trained.update, bern.store, orders[0].task)  # nothing of it travels
    assert {path.name for path in hub.blobs.folder.iterdir()} == {model}
    for site, order in ((kyoto, orders[1]), (quito, orders[2])):
        await site.answer(order)
    receipt = await hub.receipt(run)
    assert [counted.site for counted in receipt.counted] == ["bern", "kyoto", "quito"]
    assert await bern.next(Forget) == Forget(orders[0].task, True)  # only now


async def test_what_a_site_handed_in_partly_goes_with_the_round(
    hub: Hub, sites: list[Site]
) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    order = await bern.order()
    blob = bern.trained(order).update
    assert hub.runs.desk.objection(bern.name, order.task, blob) == ""
    intake = hub.blobs.receive(blob, bern.name)
    intake.write(b"the beginning")
    await bern.send(Failed(order.task, "enough"))
    await play(others)
    await hub.receipt(run)
    model = (await bern.order()).model.digest
    assert {path.name for path in hub.blobs.folder.iterdir()} == {model}
    with pytest.raises(Unreachable, match="a newer transfer took over"):
        intake.write(b"the rest")


async def test_the_state_on_the_disk_is_the_next_model_that_is_sent(
    hub: Hub, sites: list[Site]
) -> None:
    await hub.submit(plan())
    await play(sites)
    digest = (await sites[0].order()).model.digest
    (state,) = (hub.path / "states").iterdir()
    assert state.samefile(hub.blobs.path(digest))


async def test_an_equal_update_that_went_with_another_run_is_asked_for_again(
    hub: Hub, sites: list[Site]
) -> None:
    run = await hub.submit(plan())
    bern, *others = sites
    order = await bern.order()
    await bern.send(bern.trained(order))  # as if its blob had gone in between
    assert await bern.order() == order
    await bern.answer(order)
    await play(others)
    assert not (await hub.receipt(run)).missing


# --- the same bytes -----------------------------------------------------------------------------


async def test_any_order_of_arrival_gives_the_same_model(hub: Hub, sites: list[Site]) -> None:
    models = set()
    for order_of_arrival in itertools.permutations(range(3)):
        run = await hub.submit(plan())
        orders = [await site.order() for site in sites]
        for place in order_of_arrival:
            await sites[place].answer(orders[place])
        models.add((await hub.receipt(run)).model)
        await hub.operator.stop_run(run)
        await hub.end(run)
        for site in sites:
            await site.next(Cancel)
    assert len(models) == 1


@pytest.mark.parametrize("changes", [{}, ROBUST], ids=["mean", "median"])
async def test_a_restart_in_the_middle_of_a_round_ends_in_the_same_bytes(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    registry = MemoryRegistry(tmp_path / "registry")
    calm = Hub(tmp_path / "calm", registry)
    sites = await world.three_sites(calm, tmp_path / "calm-sites")
    run = await calm.submit(plan(**changes))
    await play(sites)
    await play(sites)
    expected = [(await calm.receipt(run, number)).model for number in (1, 2)]
    await calm.close()

    before = Hub(tmp_path / "hub", registry)
    sites = await world.three_sites(before, tmp_path)
    assert await before.submit(plan(**changes)) == run
    await play(sites)
    orders = [await site.order() for site in sites]  # of round 2
    await sites[0].answer(orders[0])
    await before.until(run, lambda info: "1 of 3 sites answered" in info.detail)
    await before.close()

    after = Hub(tmp_path / "hub", registry)
    try:
        for site, order in zip(sites, orders, strict=True):
            await site.connect(after, order.task)
            assert await site.order() == order  # to the byte what it was asked before
        for site, order in zip(reversed(sites), reversed(orders), strict=True):
            await site.answer(order)
        models = [(await after.receipt(run, number)).model for number in (1, 2)]
        assert models == expected
        assert [r.attempt for r in after.runs.detail(run).receipts] == [1, 1]
    finally:
        await after.close()


async def test_a_site_that_was_away_is_told_what_counted(tmp_path: Path) -> None:
    before = Hub(tmp_path / "hub", MemoryRegistry(tmp_path / "registry"))
    sites = await world.three_sites(before, tmp_path)
    run = await before.submit(plan())
    tasks = []
    for site in sites:
        order = await site.order()
        tasks.append(order.task)
        await site.answer(order)
    await before.receipt(run)
    await before.close()
    after = Hub(tmp_path / "hub", MemoryRegistry(tmp_path / "registry"))
    try:
        unknown = TaskId("cancer-9.1.1.bern")
        bern = await Site(tmp_path, "bern").connect(after, tasks[0], unknown)
        assert await bern.next(Forget) == Forget(tasks[0], counted=True)
        assert await bern.next(Forget) == Forget(unknown, counted=False)
    finally:
        await after.close()


async def test_sites_hear_that_a_run_is_over_there_and_then_or_when_they_are_back(
    hub: Hub, sites: list[Site], tmp_path: Path
) -> None:
    run, other = await hub.submit(plan(rounds=1)), await hub.submit(plan(rounds=1))
    for site in sites:
        while (order := await site.order()).run != run:  # whose comes first is nobody's promise
            pass
        await site.answer(order)
    await hub.end(run)
    told = [await sites[0].next(Forget) for _ in range(2)]
    assert [forget.run for forget in told] == ["", run]
    bern = Site(tmp_path, "bern")
    bern.hello = replace(bern.hello, runs=(run, other, RunId("unheard-of")))
    await bern.connect(hub)
    told = [await bern.next(Forget) for _ in range(2)]
    assert [forget.run for forget in told] == [run, "unheard-of"]  # the other one goes on


async def test_followers_hear_that_the_coordinator_goes_down_and_not_that_all_is_well(
    hub: Hub,
) -> None:
    run = await hub.submit(plan())
    watching = hub.operator.watch_run(run)
    assert (await anext(watching)).state in ("queued", "waiting")
    await hub.runs.stop()
    with pytest.raises(Unreachable, match="is going down; cancer-1 goes on when it is back"):
        while True:
            await anext(watching)


# --- versions -----------------------------------------------------------------------------------


class Faulty(MemoryRegistry):
    """A registry during whose staging the power goes: before, after, or just as it is noted."""

    faults: list[str]
    hub: Hub

    def stage(self, bundle: Path, story: Story = UNTOLD) -> ModelVersion:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "away":
            raise Unreachable("registry at db: connection refused")
        if fault == "before":
            raise OSError(5, "power cut")
        staged = super().stage(bundle, story)
        if fault == "after":
            raise OSError(5, "power cut")
        if fault == "as it is noted":
            self.hub.runs._journal.close()
        return staged


async def test_a_crash_on_the_way_to_the_registry_registers_one_version(tmp_path: Path) -> None:
    registry = Faulty(tmp_path / "registry")
    registry.faults = ["before", "after", "as it is noted"]
    first = Hub(tmp_path / "hub", registry)
    sites = await world.three_sites(first, tmp_path)
    run = await first.submit(plan(rounds=1))
    await play(sites)
    digests = set()
    for crash in range(4):
        registry.hub = a_hub = first if crash == 0 else Hub(tmp_path / "hub", registry)
        if crash < 3:
            while a_hub.runs._playing:
                await asyncio.wait(a_hub.runs._playing.values())
            digests.add(Manifest.decode(bundle(a_hub, run).read_bytes()).digest)
            assert a_hub.runs.info(run).version == 0
        else:
            assert (await a_hub.end(run)).version == 1
            told = await card_of(a_hub.operator, await a_hub.operator.show_model("cancer", 1))
        await a_hub.close()
    [version] = registry.list("cancer")
    assert digests == {version.digest}
    manifest = Manifest.decode(registry.get("cancer", 1).manifest.encode())
    assert manifest.lineage.data == dict.fromkeys(("bern", "kyoto", "quito"), "ab" * 32)
    assert manifest.lineage.epsilon == dict.fromkeys(("bern", "kyoto", "quito"), 0.25)
    card = (registry.bundle("cancer", 1) / "privacy.txt").read_text()
    assert card.startswith("cancer/1, trained in 1 round at 3 sites. Rows stayed at their sites")
    assert card == told  # what an operator is shown is what was signed
    assert "privacy.txt" in manifest.files  # and so it is signed
    assert not bundle(first, run).parent.parent.exists()


async def test_a_run_waits_for_a_registry_that_is_away_and_says_so(tmp_path: Path) -> None:
    registry = Faulty(tmp_path / "registry")
    registry.faults = ["away", "away"]
    async with world.hub(tmp_path, registry) as a_hub:
        sites = await world.three_sites(a_hub, tmp_path)
        run = await a_hub.submit(plan(rounds=1))
        await play(sites)
        waiting = await a_hub.until(run, lambda info: info.detail.startswith("waits"))
        assert (waiting.state, waiting.detail) == (
            "running", "waits: registry at db: connection refused",
        )  # fmt: skip
        ended = await a_hub.end(run)
    assert (ended.state, ended.version, registry.faults) == ("done", 1, [])
    assert len(registry.list("cancer")) == 1


@pytest.mark.parametrize("point", ["durable.append", "durable.replace", "chunk.taken"])
async def test_a_full_disk_costs_time_and_no_round(
    hub: Hub, sites: list[Site], monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """At the journal, at a round's state, and at an update on its way in."""
    run = await hub.submit(plan(rounds=1))
    orders = [await site.order() for site in sites]
    armed = failpoints.Armed(f"{point}:1:enospc,{point}:2:enospc")
    monkeypatch.setattr(failpoints, "_armed", armed)
    for site, order in zip(sites, orders, strict=True):
        await site.answer(order)
    assert (await hub.end(run)).state == "done"
    [receipt] = hub.runs.detail(run).receipts
    assert [counted.site for counted in receipt.counted] == ["bern", "kyoto", "quito"]
    assert not armed.due


def bundle(a_hub: Hub, run: str) -> Path:
    return a_hub.path / "press" / run / "bundle" / "manifest.json"


async def test_runs_that_end_at_once_become_versions_of_their_own(
    hub: Hub, sites: list[Site]
) -> None:
    runs = [await hub.submit(plan(rounds=1)) for _ in range(2)]
    await play(sites)
    await play(sites)
    infos = [await hub.end(run) for run in runs]
    assert sorted((info.state, info.version) for info in infos) == [("done", 1), ("done", 2)]


async def test_too_large_a_model_fails_the_run_and_not_the_coordinator(tmp_path: Path) -> None:
    async with world.hub(tmp_path) as a_hub:
        sites = await world.three_sites(a_hub, tmp_path)
        a_hub.blobs.limit_bytes = 100
        run = await a_hub.submit(plan())
        ended = await a_hub.end(run)
        assert ended.state == "failed"
        assert "limit 100" in ended.detail
        a_hub.blobs.limit_bytes = 2**20
        await a_hub.submit(plan())
        await play(sites)


def test_settings_that_cannot_be_are_named() -> None:
    for wrong, message in (
        ({"port": 70000}, "port 70000"),
        ({"port": 5, "enrolment_port": 5}, "are both 5"),
        ({"grace": 0.0}, "each must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Settings(**wrong)


async def until(test: Callable[[], bool]) -> None:
    """Wait for something on the disk, which sends no event."""
    async with asyncio.timeout(60):
        while not test():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_many_sites_that_come_at_once_are_looked_at_together(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look is at every site: one for each that comes would be a million for a thousand."""
    run = await hub.submit(plan(cohort=Cohort(quorum=60, deadline=60.0)))
    await hub.until(run, lambda info: info.state == "waiting")
    looks: list[int] = []
    statuses = hub.runs.desk.statuses

    def counted() -> tuple[SiteStatus, ...]:
        looks.append(len(found := statuses()))
        return found

    monkeypatch.setattr(hub.runs.desk, "statuses", counted)
    crowd = [Site(tmp_path, f"site-{number}") for number in range(60)]
    await asyncio.gather(*(site.connect(hub) for site in crowd))
    await asyncio.gather(*(site.order() for site in crowd))
    assert looks[-1] == 60  # the last to come was seen, and all were asked
    assert len(looks) <= 30
