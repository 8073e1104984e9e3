"""A tree of two levels comes to the bytes of the flat sum, whatever becomes of a region."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fedml.coordinator.settings import Settings
from fedml.errors import ConfigError, Refused
from fedml.protocol import codec
from fedml.protocol.messages import (
    Assignment,
    Beat,
    Blob,
    Cancel,
    Command,
    Declined,
    Errands,
    Failed,
    Forget,
    Hello,
    Leaf,
    Orders,
    Privacy,
    Relayed,
    Roster,
    Scored,
    SiteId,
    Summand,
    Summed,
    Welcome,
)
from fedml.protocol.operations import Receipt
from fedml.protocol.secagg import Secagg
from fedml.releases.registry import MemoryRegistry
from fedml.rounds import Cohort, Evaluation, Plan, SiteStatus, Wire, eligible
from fedml.strategies import FedAvg
from fedml.strategies.robust import Median
from fedml.transport.link import Link
from tests.coordinator.tree import GRACE, LEAVES, Place, Tree, tree
from tests.coordinator.world import HEARTBEAT, Hub, Site, delta, packed, plan, who

ALL = tuple(sorted(itertools.chain(*LEAVES.values())))
NORTH, SOUTH = LEAVES["north"], LEAVES["south"]
LONG = 20.0  # seconds of grace within which whatever a test awaits comes about
WELL: Mapping[str, str] = {}


def plan_of(quorum: int = len(ALL), deadline: float = 60.0, **changes: object) -> Plan:
    sites = tuple(map(SiteId, ALL))
    return plan(cohort=Cohort(quorum=quorum, deadline=deadline, sites=sites), **changes)


async def act(site: Site, order: Assignment, how: str) -> None:
    """Answer an order well, or in another way."""
    match how:
        case "declines":
            await site.send(Declined(order.task, "policy says no"))
        case "is busy":
            await site.send(Declined(order.task, "later", for_now=True))
        case "fails":
            await site.send(Failed(order.task, "out of\nmemory"))
        case "sends rubbish":
            await site.answer(order, f"rubbish of {site.name}".encode())
        case "goes":
            await site.link.close()
        case "sleeps":
            pass
        case _ if order.kind == "evaluate":
            await site.send(Scored(order.task, {"accuracy": len(site.name) / 3}, 7.3))
        case _:
            await site.answer(order)


async def one_round(sites: Mapping[str, Site], how: Mapping[str, str] = WELL) -> list[Assignment]:
    """Have every site answer its next order; those that go do so once all others have spoken."""
    orders = {name: await site.order() for name, site in sites.items()}
    for name in sorted(sites, key=lambda name: how.get(name) == "goes"):
        await act(sites[name], orders[name], how.get(name, ""))
    return [orders[name] for name in sorted(orders)]


async def flat(
    folder: Path, a_plan: Plan, *hows: Mapping[str, str]
) -> tuple[list[Receipt], list[Assignment]]:
    """Return the receipts and the first orders of a flat federation, a round for each of `hows`."""
    settings = Settings(heartbeat=HEARTBEAT, grace=GRACE)
    hub = Hub(folder / "flat", MemoryRegistry(folder / "flat-registry"), settings)
    try:
        sites = {name: await Site(folder, name).connect(hub) for name in ALL}
        run, first = await hub.submit(a_plan), list[Assignment]()
        for how in hows:
            orders = await one_round(sites, how)
            first = first or orders
        receipts = [await hub.receipt(run, number) for number in range(1, len(hows) + 1)]
        return [timeless(receipt) for receipt in receipts], first
    finally:
        await hub.close()


def timeless(receipt: Receipt) -> Receipt:
    return replace(receipt, opened=0.0, closed=0.0)


async def grown_receipts(grown: Tree, a_plan: Plan, *hows: Mapping[str, str]) -> list[Receipt]:
    run = await grown.hub.submit(a_plan)
    for how in hows:
        await one_round(grown.leaves, how)
    receipts = [await grown.hub.receipt(run, number) for number in range(1, len(hows) + 1)]
    return [timeless(receipt) for receipt in receipts]


async def back(grown: Tree, name: str, orders: Mapping[str, Assignment] | None = None) -> None:
    """Start a region again, and have its leaves dial it with what they kept."""
    place = grown.places[name]
    place.start(grown.hub, grace=LONG)
    for leaf in LEAVES[name]:
        kept = [orders[leaf].task] if orders else []
        await grown.leaves[leaf].connect(place, *kept)


async def test_a_tree_comes_to_the_flat_receipts_in_any_order(tmp_path: Path) -> None:
    wanted, _ = await flat(tmp_path / "a", plan_of(), WELL, WELL)
    assert all(len(receipt.counted) == len(ALL) for receipt in wanted)
    async with tree(tmp_path / "b") as grown:
        assert await grown_receipts(grown, plan_of(), WELL, WELL) == wanted
    async with tree(tmp_path / "c") as grown:
        grown.leaves = dict(reversed(grown.leaves.items()))
        assert await grown_receipts(grown, plan_of(), WELL, WELL) == wanted


@pytest.mark.parametrize("wire", [Wire(up="bf16"), Wire(down="bf16+delta", up="zstd")])
async def test_a_tree_comes_to_the_flat_receipts_however_models_travel(
    tmp_path: Path, wire: Wire
) -> None:
    """Leaves that round nothing themselves are rounded at their region, and get models whole."""
    a_plan = plan_of(wire=wire)
    wanted, _ = await flat(tmp_path / "a", a_plan, WELL, WELL)
    exact, _ = await flat(tmp_path / "b", plan_of(), WELL, WELL)
    assert (wanted[-1].model != exact[-1].model) == (wire.up == "bf16")
    async with tree(tmp_path / "c") as grown:
        run = await grown.hub.submit(a_plan)
        orders = [*await one_round(grown.leaves), *await one_round(grown.leaves)]
        assert not any(order.parcels for order in orders)
        receipts = [timeless(await grown.hub.receipt(run, number)) for number in (1, 2)]
    assert receipts == wanted


async def test_leaves_get_the_orders_that_they_would_get_without_a_region(tmp_path: Path) -> None:
    _, wanted = await flat(tmp_path / "a", plan_of(), WELL)
    async with tree(tmp_path / "b") as grown:
        await grown.hub.submit(plan_of())
        assert await one_round(grown.leaves) == wanted
    assert len({order.seed for order in wanted}) == len(ALL)


async def test_some_sites_dial_the_hub_and_some_a_region(tmp_path: Path) -> None:
    wanted, _ = await flat(tmp_path / "a", plan_of(), WELL)
    async with tree(tmp_path / "b", {"north": NORTH}) as grown:
        for name in SOUTH:
            grown.leaves[name] = await Site(tmp_path / "b", name).connect(grown.hub)
        assert await grown_receipts(grown, plan_of(), WELL) == wanted


@pytest.mark.parametrize("how", ["declines", "is busy", "fails", "sends rubbish", "goes"])
async def test_a_leaf_that_does_not_answer_well_is_told_of_as_in_the_flat_run(
    how: str, tmp_path: Path
) -> None:
    a_plan, hows = plan_of(quorum=4), {"oslo": how, "lima": how}
    wanted, _ = await flat(tmp_path / "a", a_plan, hows)
    assert wanted[0].missing.keys() == {"oslo", "lima"}
    assert len(wanted[0].counted) == 4
    async with tree(tmp_path / "b") as grown:
        assert await grown_receipts(grown, a_plan, hows) == wanted


async def test_a_leaf_that_refuses_for_good_is_not_asked_again(tmp_path: Path) -> None:
    async with tree(tmp_path) as grown:
        run = await grown.hub.submit(plan_of(quorum=4))
        await one_round(grown.leaves, {"oslo": "declines"})
        await one_round({name: site for name, site in grown.leaves.items() if name != "oslo"})
        receipt = await grown.hub.receipt(run, 2)
    assert receipt.left_out["oslo"] == "policy says no"
    assert len(receipt.counted) == 5


async def test_a_leaf_that_sleeps_costs_itself_alone(tmp_path: Path) -> None:
    async with tree(tmp_path) as grown:
        (receipt,) = await grown_receipts(grown, plan_of(4, deadline=1.5), {"riga": "sleeps"})
    assert receipt.missing == {"riga": "no answer in time for its region"}
    assert len(receipt.counted) == 5


async def test_scores_go_up_as_they_are(tmp_path: Path) -> None:
    a_plan = plan_of(evaluation=Evaluation(every=1))
    hows = (WELL, WELL, WELL, WELL)
    wanted, _ = await flat(tmp_path / "a", a_plan, *hows)
    assert [receipt.kind for receipt in wanted] == ["train", "evaluate"] * 2
    async with tree(tmp_path / "b") as grown:
        assert await grown_receipts(grown, a_plan, *hows) == wanted


async def test_two_runs_at_once_share_regions_and_keep_apart(tmp_path: Path) -> None:
    wanted, _ = await flat(tmp_path / "a", plan_of(seed=1), WELL)
    async with tree(tmp_path / "b") as grown:
        runs = [await grown.hub.submit(plan_of(seed=seed)) for seed in (1, 2)]
        orders = {name: [await s.order(), await s.order()] for name, s in grown.leaves.items()}
        for name, site in grown.leaves.items():
            for order in reversed(orders[name]):
                other = packed({"delta": delta(site.value / 2)}) if order.run == runs[1] else None
                await site.answer(order, other)
        receipts = [await grown.hub.receipt(run) for run in runs]
    assert receipts[0].model == wanted[0].model != receipts[1].model
    assert not receipts[1].missing


# --- forgetting -----------------------------------------------------------------------------------


async def test_leaves_are_told_whether_they_counted_and_the_region_keeps_nothing(
    tmp_path: Path,
) -> None:
    async with tree(tmp_path) as grown:
        run = await grown.hub.submit(plan_of(quorum=4, rounds=1))
        orders = await one_round(grown.leaves, {"oslo": "fails"})
        assert grown.places["north"].shares()
        heard = {name: await site.next(Forget) for name, site in grown.leaves.items()}
        for order in orders:
            name = order.task.rpartition(".")[2]
            assert heard[name] == Forget(order.task, name != "oslo")
        await grown.hub.receipt(run)
        await grown.until(lambda: not any(place.shares() for place in grown.places.values()))


async def test_a_stop_reaches_the_leaves(tmp_path: Path) -> None:
    async with tree(tmp_path) as grown:
        run = await grown.hub.submit(plan_of())
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        await grown.leaves["bern"].answer(orders["bern"])
        await grown.hub.operator.stop_run(run)
        for name, site in grown.leaves.items():
            told = await site.next_of(Cancel, Forget)
            assert isinstance(told, Cancel)
            assert told.task == orders[name].task
            assert await site.next(Forget) == Forget(orders[name].task, False)
        assert (await grown.hub.end(run)).state == "stopped"
        await grown.until(lambda: not any(place.shares() for place in grown.places.values()))


# --- a region dies --------------------------------------------------------------------------------


async def test_a_region_that_is_lost_above_the_quorum_costs_its_leaves(tmp_path: Path) -> None:
    async with tree(tmp_path) as grown:
        run = await grown.hub.submit(plan_of(quorum=3))
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        for name in NORTH:
            await grown.leaves[name].answer(orders[name])
        await grown.places["south"].crash()
        receipt = await grown.hub.receipt(run)
    assert {counted.site for counted in receipt.counted} == set(NORTH)
    assert receipt.missing == dict.fromkeys(SOUTH, "its region south is away for too long")


async def test_a_region_that_is_lost_below_the_quorum_is_waited_for(tmp_path: Path) -> None:
    wanted, _ = await flat(tmp_path / "a", plan_of(), WELL)
    async with tree(tmp_path / "b") as grown:
        run = await grown.hub.submit(plan_of())
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        for name in NORTH:
            await grown.leaves[name].answer(orders[name])
        await grown.places["south"].crash()
        failed = await grown.hub.receipt(run)
        assert not failed.model
        assert set(failed.missing) == set(SOUTH)
        await back(grown, "south", orders)
        for name in SOUTH:
            told = await grown.leaves[name].next(Forget)
            assert told == Forget(orders[name].task, False)
        await one_round(grown.leaves)
        receipt = await grown.hub.receipt(run, 2)
    assert receipt.attempt == 2
    assert receipt.model == wanted[0].model


async def test_a_region_that_is_back_after_the_grace_has_no_part_in_the_open_round(
    tmp_path: Path,
) -> None:
    async with tree(tmp_path) as grown:
        run = await grown.hub.submit(plan_of(quorum=2))
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        await grown.places["south"].cable.cut()
        await grown.leaves["kyoto"].answer(orders["kyoto"])
        away = grown.hub.runs.info
        await grown.until(lambda: "3 lost" in away(run).detail)  # and the round is open still
        grown.places["south"].cable.is_cut = False
        await grown.until(lambda: "kyoto" in grown.here())
        for name in (*SOUTH[1:], *NORTH):
            await grown.leaves[name].answer(orders[name])
        receipt = await grown.hub.receipt(run)
        for name in SOUTH:
            assert await grown.leaves[name].next(Forget) == Forget(orders[name].task, False)
    assert {counted.site for counted in receipt.counted} == set(NORTH)


async def test_what_was_forgotten_while_the_cable_was_cut_is_forgotten_later(
    tmp_path: Path,
) -> None:
    async with tree(tmp_path, grace=LONG) as grown:
        run = await grown.hub.submit(plan_of())
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        for name in NORTH:
            await grown.leaves[name].answer(orders[name])
        desk = grown.hub.runs.desk
        await grown.until(lambda: desk.is_settled(SiteId("riga"), orders["riga"].task))
        cable = grown.places["north"].cable
        await cable.cut()
        for name in SOUTH:
            await grown.leaves[name].answer(orders[name])
        await grown.hub.receipt(run)
        cable.is_cut = False
        for name in NORTH:  # whose streams to their region were there all the time
            assert await grown.leaves[name].next(Forget) == Forget(orders[name].task, True)
        await grown.until(lambda: grown.places["north"].shares() == ["cancer-1.2.1/orders"])


async def test_a_cable_that_breaks_again_and_again_loses_and_doubles_nothing(
    tmp_path: Path,
) -> None:
    wanted, _ = await flat(tmp_path / "a", plan_of(), WELL)
    async with tree(tmp_path / "b", grace=LONG) as grown:
        run = await grown.hub.submit(plan_of())
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        for name in ALL:
            for place in grown.places.values():
                await place.cable.cut()
                place.cable.is_cut = False
            await grown.leaves[name].answer(orders[name])
        receipt = await grown.hub.receipt(run)
    assert timeless(receipt) == wanted[0]


@pytest.mark.parametrize("answered", [0, 1, 2])
async def test_a_region_that_dies_while_its_leaves_train_sums_them_again(
    answered: int, tmp_path: Path
) -> None:
    wanted, _ = await flat(tmp_path / "a", plan_of(), WELL)
    async with tree(tmp_path / "b", grace=LONG) as grown:
        run = await grown.hub.submit(plan_of())
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        for name in NORTH[:answered]:
            await grown.leaves[name].answer(orders[name])
            await grown.until(lambda name=name: settled(grown, "north", name, orders))  # type: ignore[misc]
        await grown.places["north"].crash()
        await back(grown, "north", orders)
        again = {name: await grown.leaves[name].order() for name in NORTH}
        assert again == {name: orders[name] for name in NORTH}
        for name in (*SOUTH, *NORTH):
            await grown.leaves[name].answer(orders[name])
        receipt = await grown.hub.receipt(run)
    assert timeless(receipt) == wanted[0]


async def answer_always(site: Site) -> None:
    while True:
        await site.answer(await site.order())


def settled(grown: Tree, place: str, leaf: str, orders: Mapping[str, Assignment]) -> bool:
    return grown.places[place].region.desk.is_settled(SiteId(leaf), orders[leaf].task)


async def test_a_kept_sum_goes_up_though_region_and_leaves_died(tmp_path: Path) -> None:
    wanted, _ = await flat(tmp_path / "a", plan_of(), WELL)
    async with tree(tmp_path / "b", grace=LONG) as grown:
        run = await grown.hub.submit(plan_of())
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        await grown.hub.coordinator.stop()  # out of reach
        for name in NORTH:
            await grown.leaves[name].answer(orders[name])
        place = grown.places["north"]
        await grown.until(lambda: any(name.endswith(".summed") for name in place.shares()))
        await place.crash()
        grown.hub.coordinator.start()
        place.start(grown.hub, grace=LONG)  # and none of its leaves is here
        for name in SOUTH:
            await grown.leaves[name].answer(orders[name])
        receipt = await grown.hub.receipt(run)
    assert timeless(receipt) == wanted[0]


async def heard(link: Link, kind: type[Command]) -> list[Command]:
    """Return what a region hears up to the first of a kind, but for greetings and beats."""
    commands: list[Command] = []
    async with asyncio.timeout(60):
        while not commands or not isinstance(commands[-1], kind):
            commands.append(await link.receive())
    return [each for each in commands if not isinstance(each, Welcome | Beat)]


async def test_orders_name_all_that_is_open_and_come_when_the_region_does(tmp_path: Path) -> None:
    """Or a sum of all would be held against a part, and be thrown away."""
    async with tree(tmp_path, {}, grace=LONG) as grown:
        link = grown.hub.coordinator.link(who("north", "region"))
        hello = Site(tmp_path, "bern").hello
        bern, oslo = (Leaf(SiteId(name), True, hello) for name in ("bern", "oslo"))
        await link.connect(Hello("1", ""))
        await link.send(Roster((bern, oslo)))
        run = await grown.hub.submit(plan(cohort=Cohort(quorum=2, deadline=60.0)))
        (orders,) = await heard(link, Orders)
        assert isinstance(orders, Orders)
        assert [lot.site for lot in orders.lots] == ["bern", "oslo"]
        await link.connect(Hello("1", ""))
        await link.send(Roster((replace(bern, here=False),)))  # of oslo it knows nothing yet
        assert await heard(link, Orders) == [orders]
        await link.send(Roster((bern,)))
        await grown.until(lambda: "bern" in grown.here())
        await grown.hub.operator.stop_run(run)
        assert [type(each) for each in await heard(link, Errands)] == [Errands]


@pytest.mark.parametrize("harm", ["cut", "gone", "orders"])
async def test_a_sum_that_is_damaged_is_made_again(harm: str, tmp_path: Path) -> None:
    wanted, _ = await flat(tmp_path / "a", plan_of(), WELL)
    async with tree(tmp_path / "b", grace=LONG) as grown:
        run = await grown.hub.submit(plan_of())
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        await grown.hub.coordinator.stop()
        for name in NORTH:
            await grown.leaves[name].answer(orders[name])
        place = grown.places["north"]
        await grown.until(lambda: any(name.endswith(".summed") for name in place.shares()))
        await place.crash()
        (folder,) = (place.path / "shares").iterdir()
        match harm:
            case "cut":
                data = (folder / "1.safetensors").read_bytes()
                (folder / "1.safetensors").unlink()
                (folder / "1.safetensors").write_bytes(data[:-1])
            case "gone":
                (folder / "1.safetensors").unlink()
            case _:
                (folder / "orders").write_bytes(b"\xff")
                (folder.parent / "cancel-0.1.1").mkdir()  # of a round that nobody remembers
        grown.hub.coordinator.start()
        await back(grown, "north", orders)
        for name in SOUTH:
            await grown.leaves[name].answer(orders[name])
        again = [asyncio.create_task(answer_always(grown.leaves[name])) for name in NORTH]
        receipt = await grown.hub.receipt(run)
        assert "cancel-0.1.1" not in [path.name for path in folder.parent.iterdir()]
        for task in again:
            task.cancel()
        await asyncio.gather(*again, return_exceptions=True)
    assert timeless(receipt) == wanted[0]


async def test_a_region_that_dies_after_its_sum_was_taken_is_not_asked_again(
    tmp_path: Path,
) -> None:
    wanted, _ = await flat(tmp_path / "a", plan_of(), WELL)
    async with tree(tmp_path / "b", grace=LONG) as grown:
        run = await grown.hub.submit(plan_of())
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        for name in NORTH:
            await grown.leaves[name].answer(orders[name])
        desk = grown.hub.runs.desk
        await grown.until(lambda: desk.is_settled(SiteId(NORTH[0]), orders[NORTH[0]].task))
        await grown.places["north"].crash()
        for name in SOUTH:
            await grown.leaves[name].answer(orders[name])
        receipt = await grown.hub.receipt(run)
        await back(grown, "north", orders)  # what became of their tasks they hear on return
        for name in NORTH:
            told = await grown.leaves[name].next_of(Forget, Assignment)
            assert told == Forget(orders[name].task, True)
        second = [await grown.leaves[name].order() for name in NORTH]
        await grown.until(lambda: grown.places["north"].shares() == ["cancer-1.2.1/orders"])
    assert timeless(receipt) == wanted[0]
    assert {order.round for order in second} == {2}


async def test_hub_and_regions_die_and_the_round_goes_on(tmp_path: Path) -> None:
    wanted, _ = await flat(tmp_path / "a", plan_of(), WELL)
    async with tree(tmp_path / "b", grace=LONG) as grown:
        run = await grown.hub.submit(plan_of())
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        for name in ("bern", *SOUTH):
            await grown.leaves[name].answer(orders[name])
        await grown.until(lambda: settled(grown, "north", "bern", orders))
        desk = grown.hub.runs.desk
        await grown.until(lambda: desk.is_settled(SiteId("lima"), orders["lima"].task))
        await grown.close()
        await grown.hub.close()
        grown.hub = Hub(grown.hub.path, grown.hub.registry)
        await back(grown, "north", orders)
        grown.places["south"].start(grown.hub, grace=LONG)  # its sum lies on its disk
        for name in NORTH:
            await grown.leaves[name].answer(await grown.leaves[name].order())
        receipt = await grown.hub.receipt(run)
    assert timeless(receipt) == wanted[0]


async def test_a_leaf_that_failed_is_not_summed_once_its_region_is_back(tmp_path: Path) -> None:
    async with tree(tmp_path, grace=LONG) as grown:
        run = await grown.hub.submit(plan_of(quorum=4))
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        await act(grown.leaves["oslo"], orders["oslo"], "fails")
        await grown.until(lambda: "1 lost" in grown.hub.runs.info(run).detail)
        await grown.places["north"].crash()
        await back(grown, "north", orders)
        for name in ("bern", "riga"):
            assert await grown.leaves[name].order() == orders[name]
        for name in ("bern", "riga", *SOUTH):
            await grown.leaves[name].answer(orders[name])
        receipt = await grown.hub.receipt(run)
    assert receipt.missing == {"oslo": "out of memory"}
    assert len(receipt.counted) == 5


async def test_a_leaf_that_is_not_back_after_its_region_died_is_lost_alone(tmp_path: Path) -> None:
    async with tree(tmp_path, grace=LONG) as grown:
        run = await grown.hub.submit(plan_of(quorum=4))
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        place = grown.places["north"]
        await place.crash()
        place.start(grown.hub, grace=1.5)
        for name in ("bern", "riga"):
            await grown.leaves[name].connect(place, orders[name].task)
            assert await grown.leaves[name].order() == orders[name]
        for name in ("bern", "riga", *SOUTH):
            await grown.leaves[name].answer(orders[name])
        receipt = await grown.hub.receipt(run)
    assert receipt.missing == {"oslo": "away for more than 1.5 s"}
    assert len(receipt.counted) == 5


# --- what is refused ------------------------------------------------------------------------------


async def test_a_reducer_that_needs_each_update_is_refused_over_a_region(tmp_path: Path) -> None:
    robust = FedAvg(reducer=Median(f=1))
    async with tree(tmp_path, {"north": NORTH}) as grown:
        with pytest.raises(ConfigError) as refusal:
            await grown.hub.submit(plan_of(3, strategy=robust))
        assert str(refusal.value) == (
            "region north sends the sum of its sites' updates and reducer Median needs each of "
            "them: use reducer=weighted-mean, or name in cohort.sites only sites that dial this "
            "coordinator"
        )
        own = tuple(map(SiteId, SOUTH))
        cohort = Cohort(quorum=3, deadline=60.0, sites=own)
        run = await grown.hub.submit(plan(cohort=cohort, strategy=robust))
        sites = {n: await Site(tmp_path, n).connect(grown.hub) for n in SOUTH}
        await one_round(sites)
        assert len((await grown.hub.receipt(run)).counted) == 3


async def test_noise_for_each_site_and_masks_are_refused_over_a_region(tmp_path: Path) -> None:
    central = Privacy("site_central", 3.0, 1e-5, rounds=1)
    cohort = Cohort(quorum=3, deadline=60.0)
    async with tree(tmp_path, {"north": NORTH}) as grown:
        with pytest.raises(ConfigError, match="site_central privacy looks at each one's norm"):
            await grown.hub.submit(plan(cohort=cohort, privacy=central, rounds=1))
    statuses = [SiteStatus(SiteId(n), True, region="north", can_mask=True) for n in NORTH]
    masked = plan(cohort=cohort, secagg=Secagg("sa1"), evaluation=Evaluation(at_end=False))
    left_out = eligible(masked, statuses, {}).left_out
    assert all(
        "secagg adds up masked words of sites that dial us" in why for why in left_out.values()
    )
    assert set(left_out) == set(NORTH)


async def test_a_region_that_comes_later_is_left_out_of_a_robust_run(tmp_path: Path) -> None:
    async with tree(tmp_path, {}) as grown:
        cohort = Cohort(quorum=3, deadline=60.0)
        a_plan = plan(cohort=cohort, strategy=FedAvg(reducer=Median(f=1)))
        run = await grown.hub.submit(a_plan)
        await grown.grow({"north": NORTH})
        sites = {n: await Site(tmp_path, n).connect(grown.hub) for n in SOUTH}
        await one_round(sites)
        receipt = await grown.hub.receipt(run)
    assert set(receipt.left_out) == set(NORTH)
    assert "needs each of them" in receipt.left_out["bern"]


async def test_a_name_that_is_taken_stays_with_whom_it_is(tmp_path: Path) -> None:
    async with tree(tmp_path, {"north": ("bern", "oslo")}) as grown:
        place = Place(tmp_path, "south")
        grown.places["south"] = place
        own = await Site(tmp_path, "lima").connect(grown.hub)
        place.start(grown.hub)
        for name in ("bern", "lima", "riga"):
            await Site(tmp_path / "thief", name).connect(place)
        await grown.until(lambda: "riga" in grown.here())
        regions = {str(info.site): info.region for info in await grown.hub.operator.list_sites()}
        assert regions["bern"] == "north"
        assert regions["lima"] == ""
        assert regions["riga"] == "south"
        run = await grown.hub.submit(plan(cohort=Cohort(quorum=4, deadline=60.0)))
        order = await own.order()
        assert order.run == run


async def test_a_region_speaks_for_its_own_leaves_alone(tmp_path: Path) -> None:
    async with tree(tmp_path) as grown:
        run = await grown.hub.submit(plan_of(quorum=4))
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        link = grown.places["south"].region
        forged = codec.encode_event(Failed(orders["bern"].task, "forged"))
        link._outbox.put_nowait(Relayed(SiteId("bern"), forged))
        for name, site in grown.leaves.items():
            await site.answer(orders[name])
        receipt = await grown.hub.receipt(run)
    assert not receipt.missing


async def test_a_region_cannot_hand_in_a_sum_for_leaves_of_another(tmp_path: Path) -> None:
    async with tree(tmp_path) as grown:
        run = await grown.hub.submit(plan_of())
        orders = {name: await site.order() for name, site in grown.leaves.items()}
        forged = Summand(SiteId("bern"), orders["bern"].task, 1e9, "ab" * 32)
        outbox = grown.places["south"].region._outbox
        for _ in range(2):
            outbox.put_nowait(Summed(Blob("cd" * 32, 100), (forged,), {"delta": 0}))
        for name, site in grown.leaves.items():
            await site.answer(orders[name])
        receipt = await grown.hub.receipt(run)
    assert not receipt.missing


async def test_other_orders_under_the_same_ids_are_not_answered_with_what_is_kept(
    tmp_path: Path,
) -> None:
    async with tree(tmp_path, {"north": NORTH}) as grown:
        cohort = Cohort(quorum=3, deadline=60.0)
        run = await grown.hub.submit(plan(cohort=cohort))
        order = await grown.leaves["bern"].order()
        region = grown.places["north"].region
        (share,) = region._shares.values()
        orders = Orders(replace(share._order, deadline=7.0), tuple(share.lots.values()))
        share.take(orders)
        receipt = await grown.hub.receipt(run)
    assert order.deadline == 60.0
    assert set(receipt.missing) == set(NORTH)
    assert "keeps another order under this id" in receipt.missing["bern"]


async def test_a_tree_has_two_levels(tmp_path: Path) -> None:
    async with tree(tmp_path, {"north": ("bern",)}) as grown:
        place = grown.places["north"]
        with pytest.raises(ConfigError, match="a tree has two levels"):
            await place.operator.invite("east", "region", 60.0)
        link = place.coordinator.link(who("east", "region"))
        with pytest.raises(Refused, match="a tree has two levels"):
            await link.connect(grown.leaves["bern"].hello)


async def test_a_region_s_operator_is_sent_to_its_parent(tmp_path: Path) -> None:
    async with tree(tmp_path, {"north": ("bern",)}) as grown:
        operator = grown.places["north"].operator
        with pytest.raises(ConfigError, match="north is a region of hub: runs, models and"):
            await operator.submit(plan().to_json())
        with pytest.raises(ConfigError, match="use a profile of its"):
            await operator.list_runs()
        (leaf,) = await operator.list_sites()
        assert (leaf.site, leaf.connected) == ("bern", True)
        assert (await operator.invite("riga", "site", 60.0)).token
        infos = {info.site: info for info in await grown.hub.operator.list_sites()}
        assert infos[SiteId("bern")].region == "north"
        assert infos[SiteId("north")].region == ""
