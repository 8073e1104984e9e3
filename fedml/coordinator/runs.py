"""All runs of a coordinator: taken in, hosted, resumed after a crash, and made into versions."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog

from fedml import durable
from fedml.coordinator import press
from fedml.coordinator.desk import Answer, Desk
from fedml.coordinator.folder import Folder
from fedml.coordinator.host import Host, run_info, was_counted
from fedml.coordinator.journal import Ended, History, Journal, Submitted
from fedml.errors import ConfigError, FedmlError
from fedml.learning.recipe import identify
from fedml.params import Params, encode, read
from fedml.protocol.messages import Assignment, RunId, SiteId, TaskId
from fedml.protocol.operations import Receipt, RunDetail, RunInfo
from fedml.records import to_record
from fedml.releases.manifest import WEIGHTS, Lineage, Manifest
from fedml.releases.registry import Registry, Story
from fedml.rounds.hosting import Candidate
from fedml.rounds.plan import Plan
from fedml.rounds.run import Run
from fedml.transport.chunks import BlobStore

T = TypeVar("T")
_log = structlog.get_logger()


class Archive:
    """The registry and the release repository behind one thread: one writer, never the loop's.

    `open_registry` takes seconds; it is called in that thread, with the first piece of work.
    """

    def __init__(self, open_registry: Callable[[], Registry]) -> None:
        self._open, self._registry = open_registry, None
        self._thread = ThreadPoolExecutor(1, "archive")

    _registry: Registry | None

    async def do(self, work: Callable[[Registry], T]) -> T:
        """Run blocking `work` on the registry; calls go one after another."""

        def act() -> T:
            self._registry = self._registry or self._open()
            return work(self._registry)

        return await asyncio.get_running_loop().run_in_executor(self._thread, act)


class Runs:
    """Every run that was ever submitted here. Enter it to resume those that were under way."""

    def __init__(self, folder: Folder, archive: Archive, blobs: BlobStore) -> None:
        self._folder, self._archive, self._blobs = folder, archive, blobs
        self._journal = Journal(folder.path)
        if self._journal.torn:
            _log.warning("journal mended", bytes_cut=len(self._journal.torn))
        self._hosts: dict[RunId, Host] = {}
        self._playing: dict[RunId, asyncio.Task[None]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._watchers: dict[RunId, set[asyncio.Event]] = {}
        self.desk = Desk(
            heartbeat=folder.settings.heartbeat,
            grace=folder.settings.grace,
            answered=self._answered,
            lost=self._lost,
            changed=self._sites_changed,
            was_counted=self._was_counted,
            models=lambda: folder.releases.models(),
        )

    def resume(self) -> None:
        """Host every run that the journal says has not ended."""
        for id, history in self._journal.runs.items():
            if history.ended is None:
                self._start(id)

    async def stop(self) -> None:
        """Let go of all runs as they are; they go on when the coordinator is back."""
        for task in self._playing.values():
            task.cancel()
        await asyncio.gather(*self._playing.values(), return_exceptions=True)
        self._journal.close()

    # --- what operators do --------------------------------------------------------------------

    async def submit(self, by: str, text: str) -> RunInfo:
        """Take a plan in; raises `ConfigError` with everything that is wrong with it."""
        plan = Plan.from_json(text)
        here = identify(plan.recipe.name)
        if here != plan.recipe:
            raise ConfigError(
                f"recipe {plan.recipe.name}: the plan names {plan.recipe.digest[:12]}, this "
                f"coordinator has {here.digest[:12]}; install the same version at both"
            )
        if plan.parent:
            await self._archive.do(lambda registry: registry.get(plan.model, plan.parent))
        id = RunId(f"{plan.model}-{1 + len(self._journal.runs)}")
        entry = Submitted(id, plan.to_json(), by, time.time())
        await asyncio.to_thread(self._journal.append, entry)
        self._start(id)
        return self.info(id)

    def info(self, id: RunId) -> RunInfo:
        """Return a run in one line; raises `ConfigError` if there is none."""
        self._history(id)
        host = self._hosts.get(id)
        return run_info(self._journal, id, host.run if host else None)

    def all(self) -> list[RunInfo]:
        """Return all runs, oldest first."""
        return [self.info(id) for id in self._journal.runs]

    def detail(self, id: RunId) -> RunDetail:
        """Return a run with its plan and receipts."""
        history = self._history(id)
        return RunDetail(self.info(id), history.submitted.plan, tuple(history.receipts))

    def halt(self, id: RunId, reason: str) -> RunInfo:
        """Ask a run to stop; one that has ended stays as it is."""
        self._history(id)
        if id in self._hosts:
            self._hosts[id].stop(reason)
        return self.info(id)

    async def watch(self, id: RunId) -> AsyncGenerator[RunInfo, None]:
        """Yield the run now and whenever it changed, until it is over."""
        self._history(id)
        bell = asyncio.Event()
        self._watchers.setdefault(id, set()).add(bell)
        try:
            while True:
                info = self.info(id)
                yield info
                if id not in self._playing:
                    return
                await bell.wait()
                bell.clear()
        finally:
            self._watchers[id].discard(bell)

    # --- playing ------------------------------------------------------------------------------

    def _history(self, id: RunId) -> History:
        if id not in self._journal.runs:
            known = ", ".join(self._journal.runs) or "none"
            raise ConfigError(f"no run {id!r}; there are {known}")
        return self._journal.runs[id]

    def _start(self, id: RunId) -> None:
        task = asyncio.create_task(self._play(id))
        self._playing[id] = task

        def ended(_: asyncio.Task[None]) -> None:
            self._playing.pop(id, None)
            self._hosts.pop(id, None)
            self._changed(id)

        task.add_done_callback(ended)

    async def _play(self, id: RunId) -> None:
        try:
            host = Host(
                await self._load(id),
                desk=self.desk,
                journal=self._journal,
                blobs=self._blobs,
                register=self._register,
                changed=self._changed,
            )
            self._hosts[id] = host
            host.sites_changed()
            await host.play()
        except FedmlError as error:
            _log.error("run failed", run=id, reason=str(error))
            await asyncio.to_thread(self._journal.append, Ended(id, "failed", str(error)))

    async def _load(self, id: RunId) -> Run:
        history = self._journal.runs[id]
        state = await asyncio.to_thread(self._journal.state, id)
        if state is None:
            first = await self._first_params(id, history.plan)
            state = history.plan.strategy.start(first)
        return Run.resume(id, history.plan, state, history.receipts, history.opened)

    async def _first_params(self, id: RunId, plan: Plan) -> Params:
        if plan.parent:
            bundle = await self._archive.do(lambda r: r.bundle(plan.model, plan.parent))
            return read(bundle / WEIGHTS)[""]
        path = self._folder.path / "press" / f"{id}.first.safetensors"
        if not path.exists():
            await press.initial_params(plan.recipe, plan.seed, path)
        return read(path)[""]

    def _answered(self, site: SiteId, order: Assignment, answer: Answer) -> None:
        host = self._hosts.get(order.run)
        if host is not None:
            chore = asyncio.create_task(host.answered(site, order, answer))
            self._chores.add(chore)
            chore.add_done_callback(self._chores.discard)

    def _lost(self, site: SiteId, reason: str) -> None:
        for host in self._hosts.values():
            host.lost(site, reason)

    def _sites_changed(self) -> None:
        for host in self._hosts.values():
            host.sites_changed()

    def _changed(self, id: RunId) -> None:
        for bell in self._watchers.get(id, ()):
            bell.set()

    def _was_counted(self, task: TaskId) -> bool:
        """True if a kept task's update entered a model: told to sites that were away."""
        for id, history in self._journal.runs.items():
            for receipt in history.receipts:
                prefix = f"{id}.{receipt.round}.{receipt.attempt}."
                if receipt.kind == "train" and task.startswith(prefix):
                    return was_counted(receipt, SiteId(task.removeprefix(prefix)))
        return False

    # --- from a candidate to a version --------------------------------------------------------

    async def _register(self, run: Run, candidate: Candidate) -> int:
        """Make a bundle of the candidate and stage it; after a crash the same bundle is staged."""
        work = self._folder.path / "press" / run.id
        plan = run.plan
        if not (work / "bundle" / "manifest.json").exists():
            shutil.rmtree(work, ignore_errors=True)
            version = await self._archive.do(lambda r: r.next_version(plan.model))
            facts = self._facts(run, candidate, version)
            weights = work / "weights.safetensors"
            durable.replace(weights, *encode({"": candidate.params}))
            await press.bundle(plan.recipe, weights, facts, work / "draft")
            (work / "draft").rename(work / "bundle")
        story = Story(candidate.receipts, _flat(to_record(plan)))
        staged = await self._archive.do(lambda r: r.stage(work / "bundle", story))
        await asyncio.to_thread(shutil.rmtree, work)
        return staged.version

    def _facts(self, run: Run, candidate: Candidate, version: int) -> Manifest:
        plan, receipts = run.plan, candidate.receipts
        spent: dict[str, float] = {}
        for receipt in receipts:
            for counted in receipt.counted:
                spent[counted.site] = max(spent.get(counted.site, 0.0), counted.epsilon)
        data = {
            info.site: card.digest
            for info in self.desk.sites()
            for card in info.datasets
            if card.name == plan.dataset and info.site in spent
        }
        lineage = Lineage(
            run=run.id,
            recipe=plan.recipe,
            rounds=run.done,
            parent=plan.parent,
            receipts=tuple(digest_of(receipt) for receipt in receipts),
            plan=plan.digest(),
            code=code_digest(),
            data=data,
            epsilon=spent,
            delta=plan.privacy.delta,
        )
        created = receipts[-1].closed  # not now: the same after a crash
        return Manifest(plan.model, version, created, lineage, scores=candidate.scores)


def digest_of(receipt: Receipt) -> str:
    """SHA-256 of a receipt's canonical JSON, in hex."""
    return hashlib.sha256(durable.dump_json(to_record(receipt))).hexdigest()


def code_digest() -> str:
    """SHA-256 over the names and bytes of this package's own source files, in hex."""
    root, total = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def _flat(record: object, prefix: str = "") -> dict[str, str]:
    """Return nested settings as one level of dotted names, as a tracking page shows them."""
    if isinstance(record, dict):
        flat: dict[str, str] = {}
        for key, value in record.items():
            flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: str(record)}
