"""All runs of a coordinator: taken in, hosted, resumed after a crash, and made into versions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import structlog
from structlog.contextvars import bind_contextvars

from fedml.coordinator import press
from fedml.coordinator.allowance import copy_of, result
from fedml.coordinator.apps import AppHost
from fedml.coordinator.archive import Archive
from fedml.coordinator.desk import Answer, Desk
from fedml.coordinator.folder import Folder
from fedml.coordinator.holds import Holds
from fedml.coordinator.host import Host, run_info
from fedml.coordinator.journal import Begun, Ended, Halted, History, Journal, Resumed, Submitted
from fedml.coordinator.mint import Mint
from fedml.coordinator.patience import insist
from fedml.errors import ConfigError, FedmlError, Unreachable
from fedml.learning.recipe import identify
from fedml.params import Params, read
from fedml.protocol.apps import AppPlan, is_app_plan
from fedml.protocol.messages import Assignment, RunId, SiteId, TaskId
from fedml.protocol.operations import RunDetail, RunInfo
from fedml.releases.manifest import WEIGHTS
from fedml.rounds.hosting import Opened
from fedml.rounds.plan import Plan
from fedml.rounds.run import Run
from fedml.rounds.selection import needs_each
from fedml.strategies import ServerState
from fedml.transport.chunks import BlobStore

T = TypeVar("T")
_LATEST = 4e9  # seconds since the epoch; later is a mistake
_LOOK = 30.0  # seconds between looks at the clock while a run is scheduled
_log = structlog.get_logger()


class Runs:
    """Every run that was ever submitted here; `resume` goes on with those under way."""

    def __init__(self, folder: Folder, archive: Archive, blobs: BlobStore) -> None:
        self._folder, self._archive, self._holds = folder, archive, Holds(blobs)
        self._journal = Journal(folder.path, folder.sealer)
        if self._journal.torn:
            _log.warning("journal mended", bytes_cut=len(self._journal.torn))
        self._mint = Mint(folder.path / "press", archive, self._journal)
        self._hosts: dict[RunId, Host | AppHost] = {}
        self._playing: dict[RunId, asyncio.Task[None]] = {}
        self._chores: set[asyncio.Task[None]] = set()
        self._watchers: dict[RunId, set[asyncio.Event]] = {}
        self._stuck: set[RunId] = set()  # a bug or a full disk ended their host
        self._order = asyncio.Lock()  # one change of what runs there are at a time
        self._alarm: asyncio.TimerHandle | None = None  # for the next scheduled run
        self._resumed = self._draining = False
        self.desk = Desk(
            heartbeat=folder.settings.heartbeat,
            grace=folder.settings.grace,
            answered=self._answered,
            lost=self._lost,
            changed=self._sites_changed,
            was_counted=self._was_counted,
            models=lambda: folder.releases.models(),
            is_over=self._is_over,
            is_open=self._is_open,
            roster=folder.roster.digest.hex() if folder.roster else "",
        )

    def resume(self) -> None:
        """Host the runs that have not ended: as many as may be at once, in order."""
        self._resumed = True
        self._fill()

    def unready(self) -> str:
        """Say why no run is taken in; "" while they are."""
        if self._draining:
            return "the coordinator is going down"
        return "" if self._resumed else "the coordinator is starting"

    async def drain(self, seconds: float) -> None:
        """Open no further rounds, and wait at most `seconds` for those that are open."""
        self._draining = True
        for host in self._hosts.values():
            host.drain()
        self._ring()  # who follows a run that waits has nothing to wait for
        try:
            async with asyncio.timeout(seconds):
                for host in list(self._hosts.values()):
                    await host.at_rest.wait()
        except TimeoutError:
            for id, history in self._journal.runs.items():
                if history.ended is None and history.opened is not None:
                    opening = history.opened.opening
                    _log.info("round parked; its sites keep their work", run=id,
                              round=opening.number, sites=list(opening.asked))  # fmt: skip

    async def stop(self) -> None:
        """Let go of all runs as they are; they go on when the coordinator is back."""
        self._draining = True
        if self._alarm is not None:
            self._alarm.cancel()
        for task in self._playing.values():
            task.cancel()
        await asyncio.gather(*self._playing.values(), return_exceptions=True)
        self._ring()
        self._journal.close()

    # --- what operators do --------------------------------------------------------------------

    async def submit(self, by: str, text: str, starts: float = 0.0) -> RunInfo:
        """Take a plan in; raises `ConfigError` with everything that is wrong with it.

        The run starts when it is its turn, and not before `starts`.
        """
        self._check_open()
        if not 0 <= starts < _LATEST:
            raise ConfigError(f"starts {starts}: seconds since the epoch, or 0 for now")
        if is_app_plan(text):
            app = AppPlan.from_json(text)
            copy_of(self._folder.path, app.app)
            return await self._take_in(app.app.name, app.to_json(), by, starts)
        plan = Plan.from_json(text)
        plan.check_served()
        if plan.secagg.is_on and self._folder.roster is None:
            raise ConfigError(
                f"secagg=sa1 and no {self._folder.path / 'roster.json'}: put the sites' roster "
                "there and start again, see docs/secure-aggregation.md"
            )
        here = identify(plan.recipe.name)
        if here != plan.recipe:
            raise ConfigError(
                f"recipe {plan.recipe.name}: the plan names {plan.recipe.digest[:12]}, this "
                f"coordinator has {here.digest[:12]}; install the same version at both"
            )
        listed = plan.cohort.sites
        for status in self.desk.statuses():
            within = status.region and (not listed or status.site in listed)
            if within and (reason := needs_each(plan, status.region)):
                way_out = ", or name in cohort.sites only sites that dial this coordinator"
                raise ConfigError(reason + way_out)
        if plan.parent:
            await self._archive.do(lambda registry: registry.get(plan.model, plan.parent))
        return await self._take_in(plan.model, plan.to_json(), by, starts)

    async def _take_in(self, model: str, plan: str, by: str, starts: float) -> RunInfo:
        async with self._order:
            id = RunId(f"{model}-{1 + len(self._journal.runs)}")
            entry = Submitted(id, plan, by, time.time(), starts)
            await asyncio.to_thread(self._journal.append, entry)
        self._fill()
        return self.info(id)

    def info(self, id: RunId) -> RunInfo:
        """Return a run in one line; raises `ConfigError` if there is none."""
        history = self._history(id)
        host = self._hosts.get(id)
        if host:
            return host.info
        info = run_info(self._journal, id, None)
        if history.ended:
            return info
        if id in self._stuck:
            return replace(info, detail="stands still; see the log, then restart the coordinator")
        if history.due > time.time() and not history.halted:
            return replace(info, state="scheduled")
        before = self._queue().index(id) if id not in self._playing else 0
        return replace(info, detail=f"{before} before it" if before else "next")

    def all(self) -> list[RunInfo]:
        """Return all runs, oldest first."""
        return [self.info(id) for id in self._journal.runs]

    def detail(self, id: RunId) -> RunDetail:
        """Return a run with its plan and receipts."""
        history = self._history(id)
        return RunDetail(
            self.info(id),
            history.submitted.plan,
            tuple(history.receipts),
            tuple(history.seals),
            self._folder.sealer.certificate,
            result(self._folder.path, id) if history.app else "",
        )

    async def halt(self, id: RunId, reason: str) -> RunInfo:
        """Stop a run for good, until it is resumed; one that has ended stays as it is."""
        history = self._history(id)
        async with self._order:
            if history.ended is None and not history.halted:
                entry = Halted(id, reason, time.time())
                await asyncio.to_thread(self._journal.append, entry)
                if id in self._hosts:
                    self._hosts[id].stop(reason)
        self._fill()
        return self.info(id)

    async def go_on(self, id: RunId, by: str) -> RunInfo:
        """Queue a run that was stopped, or failed, to go on from its last committed round.

        Raises `ConfigError` for any other run.
        """
        self._check_open()
        history = self._history(id)
        if history.halted and id in self._playing:
            await asyncio.wait([self._playing[id]])  # it is winding down
        async with self._order:
            if history.ended is None:
                raise ConfigError(f"{id} is {self.info(id).state}; only what has ended is resumed")
            if history.ended.state == "done" or history.version:
                raise ConfigError(f"{id} has ended with a version; submit another run")
            if history.app and history.ended.state == "failed":
                raise ConfigError(f"{id} has failed, and its sites have forgotten; run it anew")
            await asyncio.to_thread(self._journal.append, Resumed(id, by, time.time()))
        self._fill()
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
                if id in self._stuck:
                    raise Unreachable(f"{id} stands still; restart the coordinator")
                if self._draining and id not in self._playing:
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

    def _check_open(self) -> None:
        if self._draining:
            raise Unreachable("the coordinator is going down; ask again when it is back")

    def _queue(self) -> list[RunId]:
        """Return the runs that wait for a place, those first that had one before a restart."""
        now, runs = time.time(), self._journal.runs
        waiting = [
            id
            for id, history in runs.items()
            if history.ended is None
            and id not in self._playing
            and id not in self._stuck
            and (history.due <= now or history.halted)
        ]
        return sorted(waiting, key=lambda id: (not runs[id].begun, runs[id].queued))

    def _fill(self) -> None:
        """Start what has waited longest while there is room, and see to it that we look again.

        What was under way before a restart goes on in any case: sites have its work.
        """
        if self._draining:
            return
        for id in self._queue():
            history, most = self._journal.runs[id], self._folder.settings.runs_at_once
            if history.halted or history.begun or len(self._playing) < most:
                self._start(id)
        now = time.time()
        ahead = [h.due for h in self._journal.runs.values() if h.ended is None]
        due = min((at for at in ahead if at > now), default=None)
        if self._alarm is not None:
            self._alarm.cancel()
        if due is not None:  # not all at once: the wall clock may be set meanwhile
            wait = min(due - now, _LOOK) + 0.001
            self._alarm = asyncio.get_running_loop().call_later(wait, self._fill)
        self._ring()

    def _start(self, id: RunId) -> None:
        history = self._journal.runs[id]
        held = {SiteId(site) for site in history.carried}
        if history.opened is not None and not history.lapsed:
            held.update(history.opened.opening.asked)
        if held:
            self.desk.turns.take(id, sorted(held))  # before others look
        task = asyncio.create_task(self._play(id))
        self._playing[id] = task

        def ended(task: asyncio.Task[None]) -> None:
            self._playing.pop(id, None)
            self._hosts.pop(id, None)
            self.desk.turns.leave(id)
            self.desk.turn_over()
            if not task.cancelled() and (error := task.exception()):
                self._stuck.add(id)
                _log.error("the run stands still; restart the coordinator", run=id, exc_info=error)
            self._fill()
            self._changed(id)

        task.add_done_callback(ended)

    async def _play(self, id: RunId) -> None:
        bind_contextvars(run=id)
        history = self._journal.runs[id]
        try:
            if not history.begun and not history.halted:
                await self._note(Begun(id, time.time()))
            if history.app:
                return await self._play_app(id, history.app)
            run = await insist(partial(self._load, id), _waits)
            if run is None:
                return await self._wind_up(id)
            if history.halted:
                run.halt(history.halted)
            host = Host(
                run,
                desk=self.desk,
                journal=self._journal,
                holds=self._holds,
                register=self._mint.register,
                changed=self._changed,
                grace=self._folder.settings.grace,
            )
            self._hosts[id] = host
            if self._draining:
                host.drain()
            host.sites_changed()
            await host.play()
        except FedmlError as error:
            await self._fail(id, str(error))

    async def _play_app(self, id: RunId, plan: AppPlan) -> None:
        host = AppHost(
            id,
            plan,
            desk=self.desk,
            journal=self._journal,
            holds=self._holds,
            folder=self._folder.path,
            changed=self._changed,
        )
        self._hosts[id] = host
        if self._draining:
            host.drain()
        await host.play(self._journal.runs[id].halted)

    async def _wind_up(self, id: RunId) -> None:
        """End a run that was stopped while nothing of it was open."""
        history = self._journal.runs[id]
        done = run_info(self._journal, id, None).round
        detail = f"{history.halted}; {done} rounds are committed"
        await self._note(Ended(id, "stopped", detail))
        _log.info("run ended", state="stopped", detail=detail)

    async def _fail(self, id: RunId, reason: str) -> None:
        _log.error("run failed", reason=reason)
        for door, digest in self.desk.abandon(id, f"the run failed: {reason}"):
            self._holds.store.abandon(digest, door)
            self._holds.discard(digest)
        history = self._journal.runs[id]  # perhaps nothing was assigned again since a restart
        tasks = {SiteId(site): TaskId(task) for site, task in history.carried.items()}
        if opened := history.opened:
            tasks.update({site: opened.opening.task_id(site) for site in opened.opening.asked})
        for site, task in tasks.items():
            self.desk.forget(site, task, counted=False)
        await self._note(Ended(id, "failed", reason))
        self.desk.conclude(id)

    async def _note(self, entry: Begun | Ended) -> None:
        """Journal what happens to a run that has no host; a full disk makes it wait."""
        note = partial(self._journal.append, entry)
        await insist(partial(asyncio.to_thread, note), _waits)

    async def _load(self, id: RunId) -> Run | None:
        """Return the run as it goes on; None if it was stopped while nothing of it was open."""
        history = self._journal.runs[id]
        if history.halted and history.opened is None:
            return None
        state = await asyncio.to_thread(self._journal.state, id)
        if state is None:
            state = await self._first(id, history.plan)
        run = Run.resume(id, history.plan, state, history.receipts, history.opened)
        lapsed = "the run had ended" if history.lapsed else ""
        if history.plan.secagg.is_on and self._folder.roster is not None:
            run.enrol(self._folder.roster)
            lapsed = lapsed or "the coordinator was restarted, and a masked sum was lost"
        run.forgive(history.forgiven, lapsed)
        for number in sorted(run.flight.rounds):
            before = await asyncio.to_thread(self._journal.state, id, number - 1)
            run.recall({number: before or await self._first(id, history.plan)})
        return run

    async def _first(self, id: RunId, plan: Plan) -> ServerState:
        return plan.start(await self._first_params(id, plan))

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
            chore.add_done_callback(partial(_tell_bug, order, site))

    def _lost(self, site: SiteId, reason: str) -> None:
        for host in self._hosts.values():
            host.lost(site, reason)

    def _sites_changed(self) -> None:
        for host in self._hosts.values():
            host.sites_changed()

    def _changed(self, id: RunId) -> None:
        for bell in self._watchers.get(id, ()):
            bell.set()

    def _ring(self) -> None:
        for id in self._watchers:
            self._changed(id)

    def _is_over(self, run: RunId) -> bool:
        """True if no run of ours goes on, or may go on, by that name."""
        history = self._journal.runs.get(run)
        return history is None or history.is_over

    def _is_open(self, task: TaskId) -> bool:
        """True if the round of a kept task goes on, though its host may not be there yet."""
        return any(
            history.ended is None
            and not (history.lapsed or history.halted)
            and (_is_of(history.opened, task) or task in history.carried.values())
            for history in self._journal.runs.values()
        )

    def _was_counted(self, task: TaskId) -> bool:
        """True if a kept task's update entered a model: told to sites that were away."""
        return any(
            task == receipt.stale.get(counted.site)
            or task == f"{id}.{receipt.round}.{receipt.attempt}.{counted.site}"
            for id, history in self._journal.runs.items()
            for receipt in history.receipts
            if receipt.kind == "train" and receipt.model
            for counted in receipt.counted
        )


def _is_of(opened: Opened | None, task: TaskId) -> bool:
    return opened is not None and task.startswith(opened.opening.task_id(SiteId("")))


def _waits(reason: str) -> None:
    if reason:
        _log.warning("the run waits", reason=reason)


def _tell_bug(order: Assignment, site: SiteId, task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("a bug lost a site's answer", run=order.run, round=order.round, site=site,
                   exc_info=error)  # fmt: skip
