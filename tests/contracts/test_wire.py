"""Whole runs over the in-memory link, real daemons and workers, however the bytes travel.

What loses nothing ends in the bytes of an exact run; what rounds ends in the bytes of the same
run played in one process without any wire (`tests.faults.oracle`).
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fedml.coordinator.settings import Settings
from fedml.learning.recipe import identify
from fedml.params import encode
from fedml.protocol.messages import RunId
from fedml.protocol.operations import Receipt, RunInfo
from fedml.releases.registry import MemoryRegistry
from fedml.rounds import Evaluation, Plan, Wire
from fedml.site import settings as site_settings
from fedml.site.daemon import Daemon
from fedml.site.policy import AllowedRecipe, Dataset, Policy
from fedml.telemetry import BYTES
from tests.coordinator.world import Hub, who
from tests.faults.fleet import ROOT, SITES, TRAIN, first_params, plan, register, rows
from tests.faults.oracle import undisturbed
from tests.site.wire import QUICK

LOSSLESS = [Wire(down="zstd", up="zstd"), Wire(down="delta"), Wire(down="delta", up="zstd")]
LOSSY = [
    Wire(down="bf16", up="bf16"),
    Wire(down="bf16+zstd", up="bf16+zstd"),
    Wire(down="bf16+delta", up="bf16"),
    Wire(down="delta", up="bf16+zstd"),
]


class Federation:
    """A coordinator and sites in this process; what joins them is memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        registry = MemoryRegistry(folder / "registry")
        settings = Settings(heartbeat=1.0, grace=20.0)
        self.hub = Hub(folder / "hub", registry, settings)
        self._daemons: dict[str, asyncio.Task[None]] = {}

    def place(self, name: str) -> Path:
        return self.folder / name

    def start(self, name: str) -> None:
        """Start a site's daemon, for the first time or again."""
        folder = self.place(name)
        folder.mkdir(exist_ok=True)
        for part in ("train", "held_out"):
            (folder / f"{part}.csv").write_text(rows(f"{name} {part}", TRAIN))
        policy = Policy(
            recipes={"light": AllowedRecipe(identify("light").digest)},
            datasets={
                "rows": Dataset(folder / "train.csv", TRAIN, ("light",), folder / "held_out.csv",
                                privacy="none")
            },
        )  # fmt: skip
        link = self.hub.coordinator.link(who(name))
        settings = site_settings.Settings(name, "localhost:1")
        daemon = Daemon(folder, settings, policy, link, backoff=QUICK)
        self._daemons[name] = asyncio.create_task(daemon.run())

    async def stop(self, name: str) -> None:
        """End a daemon as a crash would: what it has on its disk stays."""
        task = self._daemons.pop(name)
        task.cancel()
        await asyncio.wait([task])

    async def submit(self, a_plan: Plan) -> RunId:
        number = 1 + len(await self.hub.operator.list_runs())
        path = self.folder / "hub" / "press" / f"{a_plan.model}-{number}.first.safetensors"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"".join(encode({"": first_params(a_plan)})))
        return (await self.hub.operator.submit(a_plan.to_json())).id

    async def receipts(self, run: RunId) -> Sequence[Receipt]:
        await self.hub.end(run)
        return (await self.hub.operator.show_run(run)).receipts

    def undisturbed(self, a_plan: Plan) -> Sequence[Receipt]:
        return undisturbed(a_plan.to_json(), tuple(self.place(name) for name in SITES))

    async def close(self) -> None:
        for name in list(self._daemons):
            await self.stop(name)
        await self.hub.close()


@asynccontextmanager
async def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Federation]:
    register(folder / "packages")
    monkeypatch.syspath_prepend(folder / "packages")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(folder / "packages")]))
    async with AsyncExitStack() as stack:
        federation = Federation(folder)
        stack.push_async_callback(federation.close)
        for name in SITES:
            federation.start(name)
        yield federation


@pytest.fixture
async def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Federation]:
    async with opened(tmp_path, monkeypatch) as it:
        yield it


def facts(receipts: Sequence[Receipt]) -> list[object]:
    """What must not depend on how the bytes went: models, weights and digests, scores."""
    return [(r.kind, r.round, r.model, r.counted, r.scores) for r in receipts]


def a_plan(wire: Wire, rounds: int = 3) -> Plan:
    return replace(plan(5, rounds=rounds), wire=wire, evaluation=Evaluation(every=1))


def has_come_to(least: int, info: RunInfo) -> bool:
    return info.round >= least


def moved() -> float:
    """Return how many bytes of blobs have left anyone in this process."""
    return float(BYTES.labels("out")._value.get())


async def test_every_way_to_travel_ends_in_the_bytes_it_must(federation: Federation) -> None:
    taken: dict[Wire, float] = {}
    exact = facts(federation.undisturbed(a_plan(Wire())))
    for wire in [Wire(), *LOSSLESS, *LOSSY]:
        before = moved()
        told = await federation.receipts(await federation.submit(a_plan(wire)))
        taken[wire] = moved() - before
        assert facts(told) == facts(federation.undisturbed(a_plan(wire))), wire
        assert (facts(told) == exact) == (wire not in LOSSY), wire
    for wire in (*LOSSLESS, *LOSSY):
        assert taken[wire] < 0.95 * taken[Wire()], taken
    assert taken[LOSSY[1]] < taken[LOSSY[0]] < 0.8 * taken[Wire()], taken


@pytest.mark.parametrize("wire", [Wire(down="delta", up="zstd"),
                                  Wire(down="bf16+delta", up="bf16+zstd")])  # fmt: skip
async def test_a_site_that_dies_in_the_middle_and_one_that_lost_its_models_change_nothing(
    federation: Federation, wire: Wire
) -> None:
    the_plan = a_plan(wire, rounds=6)
    run = await federation.submit(the_plan)
    for number, site in enumerate((*SITES, *SITES), 1):
        await federation.hub.until(run, partial(has_come_to, number))
        await federation.stop(site)
        if number % 2:
            shutil.rmtree(federation.place(site) / "models", ignore_errors=True)
        federation.start(site)
    told = [r for r in await federation.receipts(run) if r.model]
    assert facts(told) == facts([r for r in federation.undisturbed(the_plan) if r.model])
