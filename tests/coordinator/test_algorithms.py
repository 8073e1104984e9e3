"""Every algorithm runs on a coordinator that crashes, to the bytes of its simulation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fedml.errors import Contradiction
from fedml.learning.recipe import identify
from fedml.learning.trainer import Trainer
from fedml.params import Params, decode
from fedml.protocol.messages import Assignment, Privacy, Trained, Training
from fedml.protocol.tasks import Brief, Slots, Task
from fedml.releases.registry import MemoryRegistry
from fedml.rounds import Plan
from fedml.strategies import STRATEGIES, buffering_of, contrasts, in_turn, measures
from tests.coordinator.tree import tree
from tests.coordinator.world import Hub, Site, first_params, packed, plan
from tests.simulation.worlds import Deep, cohort, engine, holdings, made, recipe, recipe_for, taught

NAMES = sorted(STRATEGIES)
TURNS = [name for name in NAMES if in_turn(made(name))]
QUICK = [name for name in NAMES if buffering_of(made(name))]  # these are in test_buffered.py
TOGETHER = sorted({*NAMES} - {*TURNS, *QUICK})
RECORD = Privacy("record", epsilon=5.0, delta=1e-5, rounds=4)


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Learner(Site):
    """A site that trains on its rows, and remembers what its rule asks it to."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder, name)
        self.memory: Slots = {}

    async def learn(self, order: Assignment) -> Trained:
        await self.link.download(order.model, self.store)
        parts = decode(self.store.path(order.model.digest).read_bytes())
        brief = Brief(parts.pop(""), order.rule, order.settings, parts)
        task = Task(order.task, order.run, order.round, self.name, "train", brief)
        rows = holdings()[self.name].train
        known = Deep() if order.rule == "moon" else recipe(order.recipe.name)
        trainer = Trainer(known, order.training, order.privacy)
        with one_thread():
            update, self.memory = trainer.train(
                task, rows, self.memory, seed=order.seed, public_rows=len(rows)
            )
        self.weight, self.metrics = update.weight, update.metrics
        return await self.answer(order, packed({"delta": update.delta, **update.slots}))

    def trained(self, order: Assignment, data: bytes | None = None) -> Trained:
        told = super().trained(order, data)
        return Trained(told.task, told.update, self.weight, self.metrics, told.epsilon)


def plan_of(name: str, **changes: object) -> Plan:
    strategy = made(name)
    return plan(
        strategy=strategy,
        recipe=identify(recipe_for(strategy)),
        training=Training(lr=0.5, steps=3, batch_size=32),
        cohort=cohort(strategy, 4),
        rounds=4,  # the last one stays open: a run that ends presses a version, which takes long
        **changes,
    )


def first_of(a_plan: Plan) -> Params:
    return Params(taught(a_plan.strategy).build().state_dict())


async def play(a_hub_path: Path, registry: MemoryRegistry, a_plan: Plan) -> list[str]:
    """Return each round's model, of a run whose coordinator is restarted within round 2."""
    hub = Hub(a_hub_path / "hub", registry)
    sites = [Learner(a_hub_path, name) for name in holdings()]
    for site in sites:
        await site.connect(hub)
    run = await hub.submit(a_plan, first=first_of(a_plan))
    for site in sites:
        await site.learn(await site.order())
    await hub.receipt(run)
    orders = [await site.order() for site in sites]
    await hub.close()

    hub = Hub(a_hub_path / "hub", registry)
    try:
        for site, order in zip(sites, orders, strict=True):
            await site.connect(hub, order.task)
            assert await site.order() == order
        for site, order in zip(sites[::-1], orders[::-1], strict=True):
            await site.learn(order)
        for site in sites:
            await site.learn(await site.order())
        receipts = [await hub.receipt(run, number) for number in (1, 2, 3)]
    finally:
        await hub.close()
    for receipt in receipts:
        assert not receipt.missing
        assert {counted.site for counted in receipt.counted} == set(holdings())
    return [receipt.model for receipt in receipts]


@pytest.mark.parametrize("name", TOGETHER)
async def test_it_comes_to_the_bytes_of_its_simulation(name: str, tmp_path: Path) -> None:
    a_plan = plan_of(name)
    models = await play(tmp_path, MemoryRegistry(tmp_path / "registry"), a_plan)
    assert len({first_of(a_plan).digest(), *models}) == 4  # it moves in every round
    with one_thread():
        candidate = engine(a_plan, known=taught(a_plan.strategy)).play().candidate
    assert candidate is not None
    assert models == [receipt.model for receipt in candidate.receipts[:3]]


@pytest.mark.parametrize("name", TURNS)
async def test_sites_that_take_turns_do_so_over_a_crash(name: str, tmp_path: Path) -> None:
    a_plan, registry = plan_of(name), MemoryRegistry(tmp_path / "registry")
    hub = Hub(tmp_path / "hub", registry)
    sites = [Learner(tmp_path, name) for name in sorted(holdings())]
    for site in sites:
        await site.connect(hub)
    run = await hub.submit(a_plan)
    await sites[0].learn(await sites[0].order())
    order = await sites[1].order()
    await hub.close()

    hub = Hub(tmp_path / "hub", registry)
    try:
        for site in sites:
            await site.connect(hub, *([order.task] if site is sites[1] else []))
        assert await sites[1].order() == order
        await sites[1].learn(order)
        await sites[2].learn(await sites[2].order())
        receipts = [await hub.receipt(run, number) for number in (1, 2, 3)]
    finally:
        await hub.close()
    assert [receipt.asked for receipt in receipts] == [(site.name,) for site in sites[:3]]
    with one_thread():
        candidate = engine(a_plan, known=taught(a_plan.strategy)).play().candidate
    assert candidate is not None
    models = [receipt.model for receipt in receipts]
    assert models == [receipt.model for receipt in candidate.receipts[:3]]


async def play_as_a_tree(folder: Path, a_plan: Plan) -> list[str]:
    """Return each round's model, of a run over two regions of which one dies within round 2."""
    names = [str(name) for name in holdings()]
    leaves = {"north": names[:2], "south": names[2:]}
    async with tree(folder, leaves, Learner, grace=20.0) as grown:
        sites = [site for site in grown.leaves.values() if isinstance(site, Learner)]
        run = await grown.hub.submit(a_plan, first=first_of(a_plan))
        for number in (1, 2, 3):
            orders = [await site.order() for site in sites]
            if number == 2:
                place = grown.places["north"]
                await place.crash()
                place.start(grown.hub, grace=20.0)
                for site, order in zip(sites[:2], orders, strict=False):
                    await site.connect(place, order.task)
                    assert await site.order() == order
            for site, order in zip(sites[::-1], orders[::-1], strict=True):
                await site.learn(order)
        receipts = [await grown.hub.receipt(run, number) for number in (1, 2, 3)]
    assert all(len(receipt.counted) == 4 for receipt in receipts)
    return [receipt.model for receipt in receipts]


@pytest.mark.parametrize("name", TOGETHER)
async def test_it_comes_to_the_same_bytes_over_two_regions(name: str, tmp_path: Path) -> None:
    a_plan = plan_of(name)
    models = await play_as_a_tree(tmp_path, a_plan)
    with one_thread():
        candidate = engine(a_plan, known=taught(a_plan.strategy)).play().candidate
    assert candidate is not None
    assert models == [receipt.model for receipt in candidate.receipts[:3]]


@pytest.mark.parametrize("name", TOGETHER)
async def test_record_privacy_takes_it_or_the_plan_refuses_it(name: str, tmp_path: Path) -> None:
    strategy = made(name)
    if measures(strategy) or contrasts(strategy):
        why = "add to the loss" if contrasts(strategy) else "report exact"
        with pytest.raises(Contradiction, match=f"with record privacy: its sites {why}"):
            plan_of(name, privacy=RECORD)
        return
    models = await play(
        tmp_path, MemoryRegistry(tmp_path / "registry"), plan_of(name, privacy=RECORD)
    )
    assert len({first_params().digest(), *models}) == 4
