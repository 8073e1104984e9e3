"""Attacks on the budget: each fails, and each succeeds where its defence is switched off."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedml import durable
from fedml.errors import BudgetExhausted, Corrupt
from fedml.privacy import chain
from fedml.privacy.accounting import Pure, SampledGaussian
from fedml.privacy.ledger import Ledger, Limits
from fedml.privacy.noise import SecureNoise
from fedml.privacy.renyi import Filter
from fedml.protocol.messages import (
    Declined,
    Forget,
    Privacy,
    RunId,
    TaskId,
    Trained,
)
from fedml.site import door
from fedml.site.door import open_ledgers
from fedml.site.gate import Permit
from tests.site.wire import ORDER, UPDATE, Wire, entries, policy, records, running, worked

ROOT = Path(__file__).parents[2]
EVENT = SampledGaussian(1.0, 20.0, 5)
OFF = pytest.mark.parametrize("defended", [True, False], ids=["defended", "undefended"])
Patch = pytest.MonkeyPatch


def open_ledger(path: Path, limit: float = 3.0) -> Ledger:
    return Ledger(path, name="records", limits=Limits(limit, 1e-5))


def filled(path: Path, first: int = 0) -> float:
    """Make a ledger with three charges; return what it has spent."""
    book = open_ledger(path)
    for number in range(first, first + 3):
        book.reserve(TaskId(f"t{number}"), RunId("run-1"), "train", EVENT)
        book.charge(TaskId(f"t{number}"))
    spent = book.spent()
    book.close()
    return spent


def succeeds(path: Path, spent: float) -> bool:
    """True if the ledger opens, and thinks that less was spent."""
    try:
        book = open_ledger(path)
    except Corrupt as error:
        assert str(path) in str(error) and "put no backup in its place" in str(error)
        return False
    less = book.spent() < spent
    book.close()
    return less


# --- the file -----------------------------------------------------------------------------------


@OFF
def test_ledger_rewritten(tmp_path: Path, monkeypatch: Patch, defended: bool) -> None:
    """Its owner says that more noise was added than was, with checksums that fit."""
    if not defended:
        monkeypatch.setattr(chain, "_hash", lambda body: "0" * 64)
    path = tmp_path / "records.jsonl"
    spent = filled(path)
    lines = []
    for line in path.read_bytes().splitlines():
        record = json.loads(line.partition(b" ")[2])
        body = durable.dump_json({**record, "noise": 1e4} if "noise" in record else record)
        lines.append(b"%08x %s\n" % (zlib.crc32(body), body))
    path.write_bytes(b"".join(lines))
    assert succeeds(path, spent) is not defended


@OFF
@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_ledger_truncated(tmp_path: Path, monkeypatch: Patch, defended: bool, kept: int) -> None:
    path = tmp_path / "records.jsonl"
    spent = filled(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    if not defended:
        monkeypatch.setattr(chain, "check_head", lambda *_: None)
    assert succeeds(path, spent) is not defended


@OFF
def test_ledger_forked(tmp_path: Path, monkeypatch: Patch, defended: bool) -> None:
    """Another history of the same dataset, whole in itself, takes its place."""
    path, other = tmp_path / "records.jsonl", tmp_path / "fork" / "records.jsonl"
    spent = filled(path)
    book = open_ledger(other)
    for number in range(4):
        book.reserve(TaskId(f"f{number}"), RunId("run-1"), "train", SampledGaussian(1.0, 99.0, 1))
    book.close()
    path.write_bytes(other.read_bytes())
    if not defended:
        monkeypatch.setattr(chain, "check_head", lambda *_: None)
    assert succeeds(path, spent) is not defended


@OFF
def test_ledger_without_its_guard(tmp_path: Path, monkeypatch: Patch, defended: bool) -> None:
    path = tmp_path / "records.jsonl"
    spent = filled(path)
    shutil.rmtree(chain.head_of(path).parent)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    if not defended:
        monkeypatch.setattr(chain, "check_head", lambda *_: None)
    assert succeeds(path, spent) is not defended


@OFF
async def test_ledger_copied_back_from_a_backup(
    tmp_path: Path, monkeypatch: Patch, defended: bool
) -> None:
    """With its guard, so that the chain is whole: what was answered since tells."""
    with open_ledgers(tmp_path, policy(tmp_path)):
        pass
    shutil.copytree(tmp_path / "ledger", tmp_path / "backup")
    worked(tmp_path)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
    shutil.rmtree(tmp_path / "ledger")
    shutil.copytree(tmp_path / "backup", tmp_path / "ledger")
    if not defended:
        monkeypatch.setattr(door, "unpaid", lambda *_: "")
    try:
        with open_ledgers(tmp_path, policy(tmp_path)) as ledgers:
            assert not defended
            assert ledgers["records", "record"].spent() == 0.0
    except Corrupt as error:
        assert defended
        assert "the ledger is older than the answer" in str(error)


# --- the budget ---------------------------------------------------------------------------------


@OFF
async def test_policy_widened_by_the_plan(
    tmp_path: Path, monkeypatch: Patch, defended: bool
) -> None:
    """The order simply says that it wants no privacy."""
    order = replace(ORDER, privacy=Privacy())
    worked(tmp_path, order)
    if not defended:

        def nod(policy: object, order: object, installed: object) -> Permit:
            return Permit(rules.datasets["open"], Path("rows"), "train", None)

        rules = policy(tmp_path)
        monkeypatch.setattr("fedml.site.clerk.decide", nod)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(order)
        if defended:
            assert "policy datasets.records.privacy" in (await wire.event(Declined)).reason
        else:
            await wire.event(Trained)
    assert entries(tmp_path) == {}
    assert wire.uploads == [UPDATE] * (not defended)


async def test_a_gate_that_lets_everything_in_still_has_a_door_behind_it(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    """Nothing made of rows that the policy guards leaves without a charge, whoever forgot it."""
    order = replace(ORDER, privacy=Privacy())
    worked(tmp_path, order)
    rules = policy(tmp_path)
    free = Permit(rules.datasets["records"], Path("rows"), "train", None)
    monkeypatch.setattr("fedml.site.clerk.decide", lambda *_: free)
    wire = Wire()
    async with running(tmp_path, wire, rules):
        wire.say(order)
        assert "no answer without a charge" in (await wire.event(Declined)).reason
    assert wire.uploads == []


@OFF
def test_budget_raced_by_two_runs_at_once(
    tmp_path: Path, monkeypatch: Patch, defended: bool
) -> None:
    """What was granted and not yet charged counts, or all who ask at once get all there is."""
    if not defended:
        monkeypatch.setattr(Filter, "hold", lambda *_: None)
    book, outcomes, start = open_ledger(tmp_path / "l", 1.0), list[str](), threading.Barrier(8)

    def run(number: int) -> None:
        start.wait()
        try:
            book.reserve(TaskId(f"t{number}"), RunId(f"run-{number}"), "held-out", Pure(0.6))
            outcomes.append("granted")
        except BudgetExhausted:
            outcomes.append("refused")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    book.close()
    assert sorted(outcomes) == ["granted"] + ["refused" if defended else "granted"] * 7


# --- crashes and retries ------------------------------------------------------------------------

PLAY = """
import asyncio, sys; from pathlib import Path
from fedml.protocol.messages import Trained
from tests.site.wire import ORDER, Wire, running
async def play():
    wire = Wire()
    async with running(Path(sys.argv[1]), wire):
        wire.say(ORDER); await wire.event(Trained); await asyncio.sleep(60)
asyncio.run(play())
"""


def die_at(point: str, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEDML_FAILPOINT": f"{point}:1:kill"}
    done = subprocess.run(
        [sys.executable, "-c", PLAY, str(folder)], env=environment, timeout=280, check=False
    )
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("point", ["work.charged", "result.kept"])
async def test_crash_between_charge_and_release(tmp_path: Path, point: str) -> None:
    worked(tmp_path)
    die_at(point, tmp_path)
    assert entries(tmp_path) == {ORDER.task: "charged"}
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
    assert wire.uploads == [UPDATE]
    assert (wire.downloads, records(tmp_path)) == (0, ["reserved", "charged"])


@pytest.mark.parametrize("point", ["update.uploaded", "update.announced"])
async def test_crash_between_release_and_acknowledgement(tmp_path: Path, point: str) -> None:
    """The coordinator may have it or not: the site sends the same bytes, and charges nothing."""
    worked(tmp_path)
    die_at(point, tmp_path)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
    assert wire.uploads == [UPDATE]
    assert (wire.downloads, records(tmp_path)) == (0, ["reserved", "charged"])


@OFF
async def test_retry_that_recomputes(tmp_path: Path, monkeypatch: Patch, defended: bool) -> None:
    """The order comes again after the site was told to forget: fresh noise would average out."""
    if not defended:
        monkeypatch.setattr(Ledger, "is_charged", lambda *_: False)
    worked(tmp_path)
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        await wire.event(Trained)
        wire.say(Forget(ORDER.task, counted=True))
        while (tmp_path / "tasks" / ORDER.task).exists():  # noqa: ASYNC110 - a folder tells nobody
            await asyncio.sleep(0)
    worked(tmp_path)  # another draw of noise
    (tmp_path / "tasks" / ORDER.task / "update.safetensors").write_bytes(b"other noise")
    (tmp_path / "tasks" / ORDER.task / "outcome.json").rename(tmp_path / "outcome")
    wire = Wire()
    wire.on_download = lambda: (tmp_path / "outcome").rename(
        tmp_path / "tasks" / ORDER.task / "outcome.json"
    )
    monkeypatch.setattr("fedml.site.foreman.Foreman.run", nothing_more)
    async with running(tmp_path, wire):
        wire.say(ORDER)
        if defended:
            assert "is not done again" in (await wire.event(Declined)).reason
        else:
            await wire.event(Trained)
    assert wire.uploads == [b"other noise"] * (not defended)
    assert records(tmp_path) == ["reserved", "charged"]


async def nothing_more(*_: object) -> None:
    """The worker is done already."""


# --- noise and counts ---------------------------------------------------------------------------


@OFF
def test_noise_seeded_from_the_experiment(monkeypatch: Patch, defended: bool) -> None:
    """Two sites with one seed: subtracting what they send removes the noise of both."""
    if not defended:
        seeded: Callable[[int], bytes] = lambda size: bytes(size)  # noqa: E731
        monkeypatch.setattr(os, "urandom", seeded)
    torch.manual_seed(0)
    bern = torch.full((100,), 1.0) + SecureNoise().normal(100, 5.0)
    torch.manual_seed(0)
    oslo = torch.full((100,), 3.0) + SecureNoise().normal(100, 5.0)
    left = float((oslo - bern - 2.0).abs().max())
    assert (left > 1.0) if defended else (left < 1e-9)


@OFF
async def test_metrics_leaking_counts(tmp_path: Path, monkeypatch: Patch, defended: bool) -> None:
    """A worker that tells how many rows it saw, as weight and among its metrics."""
    if not defended:
        monkeypatch.setattr(door, "_public", lambda *_: (93.0, {"rows": 93.0}))
    worked(tmp_path)
    outcome = {"weight": 93.0, "metrics": {"rows": 93.0, "loss": 0.5}}
    durable.replace(tmp_path / "tasks" / ORDER.task / "outcome.json", durable.dump_json(outcome))
    wire = Wire()
    async with running(tmp_path, wire):
        wire.say(ORDER)
        trained = await wire.event(Trained)
    leaks = trained.weight == 93.0 or {"rows", "loss"} & trained.metrics.keys()
    assert bool(leaks) is not defended
    if defended:
        assert trained.weight == 100.0
        assert trained.metrics.keys() == {"steps", "noise_multiplier"}
