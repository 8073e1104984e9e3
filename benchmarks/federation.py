"""Rounds of a real coordinator program with four sites that only move bytes, on loopback.

The coordinator is what operators run: mutual TLS, journal and checkpoints on disk.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.catalogue import Say
from benchmarks.crew import Crew
from benchmarks.puppet import DATASET, RECIPE
from fedml import durable
from fedml.coordinator.folder import create
from fedml.coordinator.settings import Settings
from fedml.identity.certificates import Authority, Credentials, new_key_and_csr
from fedml.learning.recipe import identify
from fedml.params import Params, encode
from fedml.protocol.messages import RunId, Training
from fedml.protocol.operations import Receipt
from fedml.rounds.plan import Cohort, Evaluation, Plan
from fedml.strategies import FedAvg
from fedml.transport.link import Operations
from fedml.transport.rpc import OperationsClient

T = TypeVar("T")
_MODEL = "bytes"
_RUN = RunId(f"{_MODEL}-1")


@dataclass(frozen=True)
class Account:
    """How the rounds went: their receipts, and the coordinator's memory in bytes."""

    receipts: tuple[Receipt, ...]
    before: int  # resident, with all loaded and nothing to do
    peak: int  # the most that was resident from then on

    @property
    def periods(self) -> list[float]:
        """Seconds from one round's opening to the next's, so commit and all."""
        return [b.opened - a.opened for a, b in itertools.pairwise(self.receipts)]


def play(size: int, rounds: int, say: Say, *, count: int = 4) -> Account:
    """Run a round of warming up and `rounds` more, of a model of `size` bytes, float32.

    `count` sites take part.

    Raises `TaskFailed` if one of the processes does not make it.
    """
    sites = [f"site-{number}" for number in range(1, count + 1)]
    total = rounds + 2  # the last only closes the period of the one before
    with tempfile.TemporaryDirectory(prefix="fedml-benchmark-") as place:
        folder = Path(place)
        hub = folder / "hub"
        create(hub, Settings(port=0, enrolment_port=0))
        floats = size // 4
        first = Params({"w": torch.zeros(floats)})
        durable.replace(hub / "press" / f"{_RUN}.first.safetensors", b"".join(encode({"": first})))
        with Crew(folder) as crew:
            pid = crew.start("coordinator", "fedml", "coordinator", "run", hub)
            address = f"localhost:{crew.await_line('coordinator', _port)}"
            operator = replace(Credentials.load(hub / "operator"), address=address)
            _ask(operator, lambda hub: hub.list_models())  # answers once the registry is open
            say("  coordinator ready")
            before = _memory(pid, "VmRSS")
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts anew
            for site in sites:
                _credentials(hub, address, site).save(folder / site)
                crew.start(site, "benchmarks.puppet", folder / site, site, floats, total)
            _ask(operator, lambda hub: hub.submit(_plan(total + 1, count).to_json()))
            crew.await_ends(sites, 60 + total * (1 + count * size / 40e6))
            peak = _memory(pid, "VmHWM")
            detail = _ask(operator, lambda hub: hub.show_run(_RUN))
        return Account(detail.receipts[1:total], before, peak)


def _plan(rounds: int, count: int) -> Plan:
    return Plan(
        model=_MODEL,
        recipe=identify(RECIPE),
        dataset=DATASET,
        strategy=FedAvg(),
        training=Training(lr=0.1, steps=1),
        cohort=Cohort(quorum=count, deadline=600.0),
        rounds=rounds,
        evaluation=Evaluation(at_end=False),
    )


def _port(line: str) -> int | None:
    """Return the port from the coordinator's log line that names it."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return int(entry["port"]) if entry.get("event") == "coordinator ready" else None


def _credentials(hub: Path, address: str, site: str) -> Credentials:
    authority = Authority.load(hub / "ca")
    key, csr = new_key_and_csr(site)
    certificate = authority.issue(csr, site, "site", time.time())
    return Credentials(address, authority.certificate, certificate, key)


def _ask(operator: Credentials, work: Callable[[Operations], Awaitable[T]]) -> T:
    async def go() -> T:
        client = OperationsClient(operator)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(go())


def _memory(pid: int, what: str) -> int:
    """Return a figure in bytes from a process's status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/{pid}/status has no {what}")
