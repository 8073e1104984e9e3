"""A coordinator packs a model once for all, unpacks updates with distrust, and needs no parcel."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
import zstandard
from blake3 import blake3

from fedml import failpoints
from fedml.coordinator.settings import Settings
from fedml.errors import Refused
from fedml.params import Params
from fedml.protocol.messages import Assignment, Blob, Forget, Parcel, RunId, Trained
from fedml.protocol.parcels import pack, rounded, unpack
from fedml.releases.registry import MemoryRegistry
from fedml.rounds import Cohort, Wire
from fedml.transport.chunks import BlobStore
from tests.coordinator.world import HEARTBEAT, SITES, Hub, Site, packed, plan

MODEL = Params(
    {"w": torch.randn(40_000, generator=torch.Generator().manual_seed(2)), "n": torch.tensor(7)}
)
DELTA = Wire(down="delta", up="bf16+zstd")


class Packer(Site):
    """A site played by the test that packs and unpacks as real ones do."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self.folder = folder / "packer" / name
        self.store = BlobStore.in_transit(self.folder / "blobs", 2**24)

    async def model(self, order: Assignment, parcel: Parcel | None, base: Path | None) -> Path:
        """Download a model, whole or as a parcel, and return its file."""
        blob = parcel.blob if parcel else order.model
        await self.link.download(blob, self.store)
        if parcel is None:
            return self.store.path(blob.digest)
        place = self.folder / f"{order.task}.{parcel.form}"
        unpack(self.store.path(blob.digest), parcel.form, order.model, place, base)
        return place

    @property
    def delta(self) -> Params:
        noise = torch.Generator().manual_seed(len(self.name))
        values = torch.randn(40_000, generator=noise) * 1e-3 * self.value
        return Params({"w": values, "n": torch.tensor(1)})

    async def train(self, order: Assignment, form: str = "zstd", *, whole: bool = False) -> Trained:
        """Hand in this site's own update, rounded; as an older version does if `whole`."""
        data = packed({"delta": self.delta if whole else rounded(self.delta)})
        if whole:
            return await self.hand_in(order, data, data)
        (path := self.folder / "update").write_bytes(data)
        return await self.hand_in(order, data, b"".join(pack(path, form)), form)

    async def hand_in(self, order: Assignment, whole: bytes, data: bytes, *forms: str) -> Trained:
        """Upload `data` and say that it stands for `whole`."""
        self.store.put_bytes(data)
        sent = Blob(blake3(data).hexdigest(), len(data))
        parcels = tuple(Parcel(form, sent) for form in forms)
        blob = Blob(blake3(whole).hexdigest(), len(whole))
        trained = Trained(order.task, blob, 1.0 + len(self.name), parcels=parcels)
        await self.link.upload(sent, self.store, order.task)
        await self.send(trained)
        return trained


class Place(Hub):
    """A coordinator whose runs start from `MODEL`."""

    @classmethod
    def at(cls, folder: Path) -> Place:
        settings = Settings(heartbeat=HEARTBEAT, grace=10.0)
        return cls(folder / "hub", MemoryRegistry(folder / "registry"), settings)

    async def begin(self, wire: Wire, **changes: object) -> RunId:
        a_plan = plan(wire=wire, cohort=Cohort(quorum=2, deadline=60.0), **changes)
        number = 1 + len(await self.operator.list_runs())
        path = self.path / "press" / f"{a_plan.model}-{number}.first.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(packed({"": MODEL}))
        return (await self.operator.submit(a_plan.to_json())).id


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Place]:
    a_hub = Place.at(tmp_path)
    yield a_hub
    await a_hub.close()


async def packers(hub: Hub, folder: Path, *names: str) -> list[Packer]:
    sites = [Packer(folder, name) for name in names or SITES]
    for site in sites:
        await site.connect(hub)
    return sites


async def play(sites: list[Packer], form: str = "zstd") -> list[Assignment]:
    orders = [await site.order() for site in sites]
    for site, order in zip(sites, orders, strict=True):
        await site.train(order, form)
    return orders


# --- down ---------------------------------------------------------------------------------------


async def test_the_next_model_is_offered_once_for_all_as_the_difference_to_the_last(
    hub: Place, tmp_path: Path
) -> None:
    sites = await packers(hub, tmp_path)
    await hub.begin(DELTA)
    first = await play(sites)
    assert {o.model for o in first} == {first[0].model}
    assert [p.form for p in first[0].parcels] == ["zstd"]  # nobody has anything yet
    bases = [await site.model(order, None, None) for site, order in zip(sites, first, strict=True)]
    orders = [await site.order() for site in sites]
    [delta] = orders[0].parcels
    assert (delta.form, delta.base) == ("delta", first[0].model.digest)
    assert all(order.parcels == orders[0].parcels and order.keep_model for order in orders)
    for site, order, base in zip(sites, orders, bases, strict=True):
        small = await site.model(order, delta, base)
        assert small.read_bytes() == (await site.model(order, None, None)).read_bytes()
    assert delta.blob.size < 0.8 * orders[0].model.size


async def test_a_late_joiner_is_offered_the_model_in_one_piece_too(
    hub: Place, tmp_path: Path
) -> None:
    early = await packers(hub, tmp_path, "bern", "kyoto")
    run = await hub.begin(DELTA)
    orders = [await site.order() for site in early]
    late = await packers(hub, tmp_path, "quito")
    for site, order in zip(early, orders, strict=True):
        await site.train(order)
    order = await late[0].order()
    assert [parcel.form for parcel in order.parcels] == ["delta", "zstd"]
    whole = await late[0].model(order, None, None)
    assert (await late[0].model(order, order.parcels[1], None)).read_bytes() == whole.read_bytes()
    for site in (*early, *late):
        await site.train(order if site in late else await site.order())
    receipt = await hub.receipt(run, 2)
    assert [one.site for one in receipt.counted] == ["bern", "kyoto", "quito"]


async def test_after_a_restart_the_same_order_comes_without_the_difference(
    tmp_path: Path,
) -> None:
    """The store is swept, and so is the model before. A site takes it for the order that it has."""
    hub = Place.at(tmp_path)
    sites = await packers(hub, tmp_path)
    run = await hub.begin(DELTA)
    await play(sites)
    before = [await site.order() for site in sites]
    await hub.close()
    hub = Place.at(tmp_path)
    try:
        for site in sites:
            await site.connect(hub, *(order.task for order in before))
        after = [await site.order() for site in sites]
        assert after == before
        assert [parcel.form for parcel in after[0].parcels] == ["zstd"]
        assert [parcel.form for parcel in before[0].parcels] == ["delta"]
        for site, order in zip(sites, after, strict=True):
            await site.train(order)
        assert len((await hub.receipt(run, 2)).counted) == 3
    finally:
        await hub.close()


async def test_a_site_gets_the_parcels_of_its_own_orders_and_no_others(
    hub: Place, tmp_path: Path
) -> None:
    [bern, _] = await packers(hub, tmp_path, "bern", "kyoto")
    await hub.begin(DELTA)
    order = await bern.order()
    stranger = (await packers(hub, tmp_path, "quito"))[0]
    with pytest.raises(Refused, match="is not for quito"):
        await stranger.link.download(order.parcels[0].blob, stranger.store)


async def test_nothing_of_a_run_stays_in_the_store(hub: Place, tmp_path: Path) -> None:
    sites = await packers(hub, tmp_path)
    for wire in (DELTA, Wire(down="bf16+delta", up="bf16+zstd"), Wire(down="bf16", up="bf16")):
        run = await hub.begin(wire)
        for _ in range(3):
            await play(sites, wire.up.split("+")[-1])
        await hub.end(run)
        for site in sites:  # told last of all
            await site.next(Forget)
        assert not list((tmp_path / "hub" / "blobs").iterdir())


# --- up -----------------------------------------------------------------------------------------


async def test_any_order_of_arrival_and_sites_of_an_older_version_end_in_the_same_bytes(
    hub: Place, tmp_path: Path
) -> None:
    """Whoever sends its update whole has it rounded here; receipts name what was counted."""
    sites = await packers(hub, tmp_path)
    models, told = set(), set()
    for number, order in enumerate(itertools.permutations(range(3))):
        run = await hub.begin(Wire(down="bf16+delta", up="bf16+zstd"), rounds=2)
        orders = [await site.order() for site in sites]
        for place in order:
            await sites[place].train(orders[place], whole=number == 3 and place == 1)
        receipt = await hub.receipt(run)
        models.add(receipt.model)
        told.add(tuple(one.digest for one in receipt.counted))
        for site in sites:
            await site.order()  # of a second round, which is not played: a version takes seconds
        await hub.operator.stop_run(run)
        await hub.end(run)
    assert len(models) == 1
    whole = tuple(blake3(packed({"delta": rounded(site.delta)})).hexdigest() for site in sites)
    older = blake3(packed({"delta": sites[1].delta})).hexdigest()
    assert told == {whole, (whole[0], older, whole[2])}


async def test_an_update_packed_in_no_way_that_was_asked_for(hub: Place, tmp_path: Path) -> None:
    sites = await packers(hub, tmp_path)
    run = await hub.begin(Wire(up="zstd"))
    orders = [await site.order() for site in sites]
    await sites[0].train(orders[0], "bf16")
    await sites[1].train(orders[1], "zstd")
    data = packed({"delta": sites[2].delta})
    await sites[2].hand_in(orders[2], data, data, "zstd", "zstd")
    receipt = await hub.receipt(run)
    assert not receipt.model  # kyoto alone is no quorum, so its update may not be waited for
    assert {site: why for site, why in receipt.missing.items() if site != "kyoto"} == {
        "bern": "update refused: it comes as ['bf16'], the order wants 'zstd'",
        "quito": "update refused: it comes as ['zstd', 'zstd'], the order wants 'zstd'",
    }
    assert "refused" not in receipt.missing.get("kyoto", "")


@pytest.mark.parametrize("attack", ["bomb", "more than agreed", "garbage", "another's update"])
async def test_a_parcel_made_to_do_harm_costs_its_site_the_round(
    hub: Place, tmp_path: Path, attack: str
) -> None:
    sites = await packers(hub, tmp_path)
    run = await hub.begin(Wire(up="bf16+zstd"))
    orders = [await site.order() for site in sites]
    for site, order in zip(sites[:2], orders, strict=False):
        await site.train(order)
    whole = packed({"delta": rounded(sites[2].delta)})
    (tmp_path / "update").write_bytes(whole)
    start = list(pack(tmp_path / "update", "zstd"))[:17]  # the header, and `n` in eight planes
    plane = zstandard.ZstdCompressor().compress(bytes(2**24))
    bomb = b"".join([*start, len(plane).to_bytes(4, "little"), plane])
    (tmp_path / "update").write_bytes(packed({"delta": sites[0].delta}))
    data, claim = {
        "bomb": (bomb, whole),
        "more than agreed": (bomb, whole + bytes(2**23)),
        "garbage": (b"\x28\xb5\x2f\xfd", whole),
        "another's update": (b"".join(pack(tmp_path / "update", "zstd")), whole),
    }[attack]
    await sites[2].hand_in(orders[2], claim, data, "zstd")
    receipt = await hub.receipt(run)
    assert [one.site for one in receipt.counted] == ["bern", "kyoto"]
    [(name, reason)] = receipt.missing.items()
    assert name == "quito"
    assert reason.startswith("update refused: ")
    assert {
        "bomb": "a plane of 16777216 bytes, where 40000 are due",
        "more than agreed": f"stands for {len(whole) + 2**23} bytes, limit ",
        "garbage": "a header of 4247762216 bytes",
        "another's update": "a parcel that is not the blob",
    }[attack] in reason
    assert not list((tmp_path / "hub" / "blobs").glob(".*"))  # no draft of it


async def test_a_full_disk_while_an_update_is_unpacked_costs_time_and_no_round(
    hub: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = await packers(hub, tmp_path)
    run = await hub.begin(Wire(up="bf16+zstd"), rounds=1)
    orders = [await site.order() for site in sites]
    armed = failpoints.Armed("parcel.unpacked:1:enospc,parcel.unpacked:2:enospc")
    monkeypatch.setattr(failpoints, "_armed", armed)
    for site, order in zip(sites, orders, strict=True):
        await site.train(order)
    receipt = await hub.receipt(run)
    assert [counted.site for counted in receipt.counted] == ["bern", "kyoto", "quito"]
    assert not armed.due


async def test_a_round_moves_the_model_by_the_mean_of_the_rounded_updates(
    hub: Place, tmp_path: Path
) -> None:
    sites = await packers(hub, tmp_path)
    run = await hub.begin(Wire(up="bf16+zstd"), rounds=1)
    await play(sites)
    receipt = await hub.receipt(run)
    state = hub.runs._journal.state(run)
    assert state is not None
    assert state.params.digest() == receipt.model
    weights = [1.0 + len(site.name) for site in sites]
    deltas = [rounded(site.delta)["w"].double() for site in sites]
    mean = sum(w * d for w, d in zip(weights, deltas, strict=True)) / sum(weights)
    assert torch.allclose(state.params["w"].double(), MODEL["w"].double() + mean, atol=1e-5)
