"""All runs of a coordinator: taken in, hosted, resumed after a crash, and made into versions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from functools import partial
from typing import TypeVar

import structlog

from fedml.coordinator import press
from fedml.coordinator.archive import Archive
from fedml.coordinator.desk import Answer, Desk
from fedml.coordinator.folder import Folder
from fedml.coordinator.holds import Holds
from fedml.coordinator.host import Host, run_info
from fedml.coordinator.journal import Ended, History, Journal, Submitted
from fedml.coordinator.mint import Mint
from fedml.coordinator.patience import insist
from fedml.errors import ConfigError, FedmlError, Unreachable
from fedml.learning.recipe import identify
from fedml.params import Params, read
from fedml.protocol.messages import Assignment, RunId, SiteId, TaskId
from fedml.protocol.operations import RunDetail, RunInfo
from fedml.releases.manifest import WEIGHTS
from fedml.rounds.plan import Plan
from fedml.rounds.run import Run
from fedml.transport.chunks import BlobStore

T = TypeVar("T")
_log = structlog.get_logger()


class Runs:
    """Every run that was ever submitted here; `resume` goes on with those under way."""

    def __init__(self, folder: Folder, archive: Archive, blobs: BlobStore) -> None:
        self._folder, self._archive, self._holds = folder, archive, Holds(blobs)
        self._journal = Journal(folder.path)
        if self._journal.torn:
            _log.warning("journal mended", bytes_cut=len(self._journal.torn))
        self._mint = Mint(folder.path / "press", archive, self._journal)
        self._hosts: dict[RunId, Host] = {}
        self._playing: dict[RunId, asyncio.Task[None]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._watchers: dict[RunId, set[asyncio.Event]] = {}
        self._halted: dict[RunId, str] = {}  # asked to stop before they were hosted
        self._one_id = asyncio.Lock()
        self.desk = Desk(
            heartbeat=folder.settings.heartbeat,
            grace=folder.settings.grace,
            answered=self._answered,
            lost=self._lost,
            changed=self._sites_changed,
            was_counted=self._was_counted,
            models=lambda: folder.releases.models(),
            is_over=self._is_over,
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
        async with self._one_id:
            id = RunId(f"{plan.model}-{1 + len(self._journal.runs)}")
            entry = Submitted(id, plan.to_json(), by, time.time())
            await asyncio.to_thread(self._journal.append, entry)
        self._start(id)
        return self.info(id)

    def info(self, id: RunId) -> RunInfo:
        """Return a run in one line; raises `ConfigError` if there is none."""
        self._history(id)
        host = self._hosts.get(id)
        return host.info if host else run_info(self._journal, id, None)

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
        elif id in self._playing:
            self._halted[id] = reason
        return self.info(id)

    async def watch(self, id: RunId) -> AsyncGenerator[RunInfo, None]:
        """Yield the run now and whenever it changed, until it is over.

        Raises `Unreachable` when the coordinator goes down before that.
        """
        self._history(id)
        bell = asyncio.Event()
        self._watchers.setdefault(id, set()).add(bell)
        try:
            while True:
                info = self.info(id)
                yield info
                if self._history(id).ended is not None:
                    return
                if id not in self._playing:
                    raise Unreachable(
                        f"the coordinator is going down; {id} goes on when it is back"
                    )
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

        def ended(task: asyncio.Task[None]) -> None:
            self._playing.pop(id, None)
            self._hosts.pop(id, None)
            if not task.cancelled() and (error := task.exception()):
                _log.error("the run stands still; restart the coordinator", run=id, exc_info=error)
            self._changed(id)

        task.add_done_callback(ended)

    async def _play(self, id: RunId) -> None:
        try:
            host = Host(
                await insist(partial(self._load, id), partial(_waits, id)),
                desk=self.desk,
                journal=self._journal,
                holds=self._holds,
                register=self._mint.register,
                changed=self._changed,
                grace=self._folder.settings.grace,
            )
            self._hosts[id] = host
            host.sites_changed()
            if reason := self._halted.pop(id, ""):
                host.stop(reason)
            await host.play()
        except FedmlError as error:
            await self._fail(id, str(error))

    async def _fail(self, id: RunId, reason: str) -> None:
        _log.error("run failed", run=id, reason=reason)
        for site, digest in self.desk.abandon(id, f"the run failed: {reason}"):
            self._holds.store.abandon(digest, site)
            self._holds.discard(digest)
        note = partial(self._journal.append, Ended(id, "failed", reason))
        await insist(partial(asyncio.to_thread, note), partial(_waits, id))
        self.desk.conclude(id)

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
            chore.add_done_callback(_tell_bug)

    def _lost(self, site: SiteId, reason: str) -> None:
        for host in self._hosts.values():
            host.lost(site, reason)

    def _sites_changed(self) -> None:
        for host in self._hosts.values():
            host.sites_changed()

    def _changed(self, id: RunId) -> None:
        for bell in self._watchers.get(id, ()):
            bell.set()

    def _is_over(self, run: RunId) -> bool:
        """True if no run of ours goes on by that name."""
        history = self._journal.runs.get(run)
        return history is None or history.ended is not None

    def _was_counted(self, task: TaskId) -> bool:
        """True if a kept task's update entered a model: told to sites that were away."""
        return any(
            task == f"{id}.{receipt.round}.{receipt.attempt}.{counted.site}"
            for id, history in self._journal.runs.items()
            for receipt in history.receipts
            if receipt.kind == "train" and receipt.model
            for counted in receipt.counted
        )


def _waits(id: RunId, reason: str) -> None:
    if reason:
        _log.warning("the run waits", run=id, reason=reason)


def _tell_bug(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("a bug lost a site's answer", exc_info=error)
