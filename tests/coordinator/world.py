"""A coordinator in process, with everything real but the network, and sites played by hand."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, Self, TypeVar

import torch

from fedml.coordinator.archive import Archive
from fedml.coordinator.branches import Branches
from fedml.coordinator.desks import Enrolment, Federation, Operations
from fedml.coordinator.folder import Folder, create
from fedml.coordinator.runs import Runs
from fedml.coordinator.settings import Settings
from fedml.errors import Unreachable
from fedml.identity.certificates import Identity
from fedml.identity.enrolment import Registrar
from fedml.learning.recipe import identify, load
from fedml.params import Params, encode
from fedml.protocol.messages import (
    Assignment,
    Command,
    DatasetCard,
    Hello,
    RunId,
    SiteEvent,
    SiteId,
    TaskId,
    Trained,
    Training,
    Welcome,
)
from fedml.protocol.operations import Receipt, RunInfo
from fedml.releases.registry import MemoryRegistry, Registry
from fedml.rounds import Cohort, Evaluation, Plan
from fedml.strategies import FedAvg
from fedml.transport.chunks import BlobStore
from fedml.transport.desks import Desks
from fedml.transport.memory import MemoryCoordinator

C = TypeVar("C")
SITES = ("bern", "kyoto", "quito")
HEARTBEAT = 600.0  # seconds: the sites that a test plays do not beat
GRACE = 1.0  # seconds: more than a busy machine takes to bring all sites back


@functools.cache
def first_params(name: str = "breast_cancer") -> Params:
    return Params(load(identify(name)).build().state_dict())


def plan(**changes: object) -> Plan:
    base = Plan(
        model="cancer",
        recipe=identify("breast_cancer"),
        dataset="records",
        strategy=FedAvg(),
        training=Training(lr=1.0, steps=1),
        cohort=Cohort(quorum=2, deadline=60.0),
        rounds=3,
        evaluation=Evaluation(at_end=False),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@functools.cache
def hello() -> Hello:
    """Return what every site says of itself; looking the recipe up takes 30 ms."""
    card = DatasetCard("records", 10, "ab" * 32)
    names = ("breast_cancer", "breast_cancer_clusters", "breast_cancer_trees")
    recipes = tuple(identify(name) for name in names)
    return Hello("1", "cpu", recipes, (card,))


def who(name: str, role: str = "site") -> Identity:
    now = time.time()
    return Identity(name, role, 1, now - 60, now + 3600)  # type: ignore[arg-type]


def delta(value: float) -> Params:
    """An update that each site could have made."""
    return first_params().map(lambda buffer: torch.full_like(buffer, value))


def packed(parts: Mapping[str, Params]) -> bytes:
    return b"".join(encode(parts))


class Hub:
    """A coordinator's folder, opened; `close` and `open` again are a crash and a restart."""

    def __init__(
        self,
        path: Path,
        registry: Registry,
        settings: Settings | None = None,
    ) -> None:
        self.path, self.registry = path, registry
        if not path.exists():
            create(path, settings or Settings(heartbeat=HEARTBEAT, grace=GRACE))
        folder = Folder.open(path)
        blobs = BlobStore.in_transit(path / "blobs", 2**24)
        archive = Archive(lambda: registry)
        self.runs = Runs(folder, archive, blobs)
        registrar = Registrar(
            folder.authority, folder.invitations, folder.revocations, "x:1", "x:2"
        )
        released = BlobStore(folder.releases.folder / "blobs", 2**24)
        desks = Desks(
            Federation(
                folder.releases.file, self.runs.desk, blobs, released, Branches(self.runs.desk)
            ),
            Operations(folder, self.runs, archive, registrar),
            Enrolment(folder, registrar),
        )
        self.coordinator = MemoryCoordinator(desks, folder.access)
        self.operator = self.coordinator.operations(who("admin", "operator"))
        self.blobs, self.releases = blobs, folder.releases
        self.runs.resume()

    async def close(self) -> None:
        await self.runs.stop()
        await self.coordinator.stop()

    async def submit(self, a_plan: Plan, starts: float = 0.0, first: Params | None = None) -> RunId:
        number = 1 + len(await self.operator.list_runs())
        path = self.path / "press" / f"{a_plan.model}-{number}.first.safetensors"
        path.parent.mkdir(exist_ok=True)
        first = first or first_params(a_plan.recipe.name)  # as the press does, which takes seconds
        path.write_bytes(packed({"": first}))
        return (await self.operator.submit(a_plan.to_json(), starts)).id

    async def until(self, run: RunId, test: Callable[[RunInfo], bool]) -> RunInfo:
        """Return the run once `test` holds for it."""
        async with asyncio.timeout(60), aclosing(self.operator.watch_run(run)) as infos:
            async for info in infos:
                if test(info):
                    return info
        raise AssertionError(f"{run} ended before")

    async def receipt(self, run: RunId, number: int = 1) -> Receipt:
        """Return the run's receipt of that number, once it is there."""
        await self.until(run, lambda _: len(self.runs.detail(run).receipts) >= number)
        return self.runs.detail(run).receipts[number - 1]

    async def end(self, run: RunId) -> RunInfo:
        return await self.until(run, lambda info: info.state in ("done", "failed", "stopped"))


@asynccontextmanager
async def hub(folder: Path, registry: Registry | None = None) -> AsyncIterator[Hub]:
    a_hub = Hub(folder / "hub", registry or MemoryRegistry(folder / "registry"))
    try:
        yield a_hub
    finally:
        await a_hub.close()


class Doors(Protocol):
    """Whatever a site dials: a hub, or a region."""

    coordinator: MemoryCoordinator


class Site:
    """A site played by the test: it hears orders and answers as it is told."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = SiteId(name)
        self.store = self.make_store(folder)
        self.hello = hello()

    def make_store(self, folder: Path) -> BlobStore:
        """Return where the site keeps what it sends."""
        return BlobStore.in_transit(folder / "sites" / self.name, 2**24)

    async def connect(self, a_hub: Doors, *kept: TaskId) -> Self:
        self.link = a_hub.coordinator.link(who(self.name))
        await self.link.connect(replace(self.hello, kept=kept))
        assert isinstance(await self.link.receive(), Welcome)
        return self

    async def next(self, kind: type[C]) -> C:
        """Return the next command of a kind; others are passed over."""
        async with asyncio.timeout(60):
            while True:
                command: Command = await self.link.receive()
                if isinstance(command, kind):
                    return command

    async def next_of(self, *kinds: type[object]) -> Command:
        """Return the next command that is of one of several kinds."""
        async with asyncio.timeout(60):
            while not isinstance(command := await self.link.receive(), kinds):
                pass
            return command

    async def order(self) -> Assignment:
        return await self.next(Assignment)

    async def answer(self, order: Assignment, data: bytes | None = None) -> Trained:
        """Upload an update and say so; by default the site's own honest one."""
        trained = self.trained(order, data)
        for last in (False, False, True):  # as a daemon does: unreachable means once more
            try:
                await self.link.upload(trained.update, self.store, order.task)
                break
            except Unreachable:
                if last:
                    raise
        await self.send(trained)
        return trained

    def trained(self, order: Assignment, data: bytes | None = None) -> Trained:
        data = packed({"delta": delta(self.value)}) if data is None else data
        blob = self.store.put_bytes(data)
        return Trained(order.task, blob, 1.0 + len(self.name), {"steps": 1.0}, 0.25)

    @property
    def value(self) -> float:
        """What sets this site's updates apart: of another size each, so that order would show."""
        known = {"bern": 1e-3, "kyoto": 3.0, "quito": -70.0}
        return known.get(self.name, 0.5 + len(self.name) + ord(self.name[0]) / 7)

    async def send(self, event: SiteEvent) -> None:
        await self.link.send(event)


async def three_sites(a_hub: Hub, folder: Path) -> list[Site]:
    return [await Site(folder, name).connect(a_hub) for name in SITES]
