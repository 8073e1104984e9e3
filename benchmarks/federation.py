"""Rounds of a real coordinator program with sites that only move bytes, on loopback.

The coordinator is what operators run: mutual TLS, journal and checkpoints on disk.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
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
from fedml.errors import TaskFailed
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
_GROUPS = 2  # processes that hold a crowd of sites
_PROCESSES = 4  # that hold the sites of a round, each one of its own if there are no more
_MODEL = "bytes"
_RUN = RunId(f"{_MODEL}-1")


@dataclass(frozen=True)
class Account:
    """How the rounds went: their receipts, and the coordinator's memory in bytes."""

    receipts: tuple[Receipt, ...]
    before: int  # resident, with all loaded and nothing to do
    peak: int  # the most that was resident from then on
    cpu: float  # seconds of processor that a round takes, the sites' too
    cpu_here: float  # of these, the coordinator's

    @property
    def periods(self) -> list[float]:
        """Seconds from one round's opening to the next's, so commit and all."""
        return [b.opened - a.opened for a, b in itertools.pairwise(self.receipts)]


@dataclass(frozen=True)
class Crowd:
    """What many sites cost: while they do nothing, and in one round with all of them."""

    connecting: float  # seconds from the first site's start to the last one's seat
    idle: float  # share of one core that the coordinator takes
    held: int  # bytes of the coordinator that all sites' being there takes
    peak: int  # the most that was resident in the round
    receipt: Receipt


def play(size: int, rounds: int, say: Say, *, count: int = 4) -> Account:
    """Run a round of warming up and `rounds` more, of a model of `size` bytes, float32.

    `count` sites take part.

    Raises `TaskFailed` if one of the processes does not make it.
    """
    sites = [f"site-{number}" for number in range(1, count + 1)]
    total = rounds + 2  # the last only closes the period of the one before
    with _hub(size) as hub:
        say("  coordinator ready")
        before = hub.memory("VmRSS")
        hub.forget_peak()
        hub.enrol(sites)
        processes = sites[:_PROCESSES]
        for first, process in enumerate(processes):
            hub.start(process, size, total, sites[first::_PROCESSES])
        used = hub.cpu()
        hub.ask(lambda desk: desk.submit(_plan(total + 1, count).to_json()))
        hub.crew.await_ends(processes, 60 + total * (1 + count * size / 40e6))
        peak, here = hub.memory("VmHWM"), hub.cpu() - used
        there = sum(hub.crew.last_word(process)["cpu"] for process in processes)
        detail = hub.ask(lambda desk: desk.show_run(_RUN))
        receipts, cpu = detail.receipts[1:total], (here + there) / total
        return Account(receipts, before, peak, cpu, here / total)


def crowd(count: int, size: int, seconds: float, say: Say) -> Crowd:
    """Connect `count` sites, watch the coordinator idle for `seconds`, play a round with all.

    Raises `TaskFailed` if a site does not make it.
    """
    names = [f"site-{number:04d}" for number in range(1, count + 1)]
    with _hub(size) as hub:
        hub.enrol(names)
        before = hub.memory("VmRSS")
        say(f"  {count} certificates issued")
        began = time.monotonic()
        groups = [f"group-{first}" for first in range(_GROUPS)]
        for first, group in enumerate(groups):
            hub.start(group, size, 1, names[first::_GROUPS])
        _await_seats(hub, groups, count, 60 + count / 5)
        connecting = time.monotonic() - began
        held = hub.memory("VmRSS") - before
        say(f"  all connected in {connecting:.3g} s, {held / count / 1e3:.0f} KB a site")
        used, began = hub.cpu(), time.monotonic()
        time.sleep(seconds)
        idle = (hub.cpu() - used) / (time.monotonic() - began)
        say(f"  idle: {idle:.1%} of a core over {seconds:g} s")
        hub.forget_peak()
        hub.ask(lambda desk: desk.submit(_plan(2, count).to_json()))
        hub.crew.await_ends(groups, 60 + count * (0.1 + size / 2e6))
        detail = hub.ask(lambda desk: desk.show_run(_RUN))
        return Crowd(connecting, idle, held, hub.memory("VmHWM"), detail.receipts[0])


def _await_seats(hub: _Hub, groups: Sequence[str], count: int, patience: float) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        hub.crew.check(groups)
        infos = hub.ask(lambda desk: desk.list_sites())
        if sum(info.connected for info in infos) == count:
            return
        time.sleep(0.5)
    raise TaskFailed(f"{len(infos)} of {count} sites were there after {patience:.0f} s")


@dataclass(frozen=True)
class _Hub:
    """A coordinator program that runs, and the processes around it."""

    folder: Path
    crew: Crew
    pid: int
    operator: Credentials

    def enrol(self, names: Sequence[str]) -> None:
        """Give each site a certificate of its own; they share one key, which takes time to make."""
        authority = Authority.load(self.folder / "hub" / "ca")
        key, csr = new_key_and_csr("site")
        for name in names:
            certificate = authority.issue(csr, name, "site", time.time())
            credentials = replace(self.operator, certificate=certificate, key=key)
            credentials.save(self.folder / name)

    def start(self, process: str, size: int, rounds: int, names: Sequence[str]) -> None:
        """Start one process with all of `names`."""
        self.crew.start(process, "benchmarks.puppet", self.folder, size // 4, rounds, *names)

    def ask(self, work: Callable[[Operations], Awaitable[T]]) -> T:
        """Ask as an operator."""
        return _ask(self.operator, work)

    def memory(self, what: str) -> int:
        """Return a figure in bytes from the coordinator's status."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) * 1024
        raise AssertionError(f"/proc/{self.pid}/status has no {what}")

    def forget_peak(self) -> None:
        """Let the peak start anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def cpu(self) -> float:
        """Return the seconds of processor that the coordinator has used, all threads together."""
        return self.crew.cpu("coordinator")


@contextmanager
def _hub(size: int) -> Iterator[_Hub]:
    """Run a coordinator whose first model has `size` bytes, in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="fedml-benchmark-") as place:
        folder = Path(place)
        hub = folder / "hub"
        create(hub, Settings(port=0, enrolment_port=0))
        first = encode({"": Params({"w": torch.zeros(size // 4)})})
        durable.replace(hub / "press" / f"{_RUN}.first.safetensors", b"".join(first))
        with Crew(folder) as crew:
            pid = crew.start("coordinator", "fedml", "coordinator", "run", hub)
            address = f"localhost:{crew.await_line('coordinator', _port)}"
            operator = replace(Credentials.load(hub / "operator"), address=address)
            _ask(operator, lambda desk: desk.list_models())  # answers once the registry is open
            yield _Hub(folder, crew, pid, operator)


def _plan(rounds: int, count: int) -> Plan:
    return Plan(
        model=_MODEL,
        recipe=identify(RECIPE),
        dataset=DATASET,
        strategy=FedAvg(),
        training=Training(lr=0.1, steps=1),
        cohort=Cohort(quorum=count, deadline=600.0 + count),
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


def _ask(operator: Credentials, work: Callable[[Operations], Awaitable[T]]) -> T:
    async def go() -> T:
        client = OperationsClient(operator)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(go())
