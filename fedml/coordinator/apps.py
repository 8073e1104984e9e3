"""The host of one run of a Flower app: starts its ServerApp, and carries what it asks to sites.

The ServerApp is a child process (`fedml.flower.player`), which keeps the replies. What it asks at
once is a wave: noted in the journal before it goes out, and over, with a receipt, once the child
has the replies on its disk; then the sites forget. After a crash the child is played from its
start, and the wave that was open is asked for again, under the same task ids.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import structlog
from structlog.contextvars import bind_contextvars, unbind_contextvars

from fedml import durable, telemetry
from fedml.coordinator.allowance import copy_of, run_folder
from fedml.coordinator.desk import Answer, Desk
from fedml.coordinator.folder import APPS
from fedml.coordinator.holds import Holds
from fedml.coordinator.host import run_info
from fedml.coordinator.intake import one_line
from fedml.coordinator.journal import Ended, Journal, RoundOpened
from fedml.coordinator.patience import insist
from fedml.coordinator.stage import Broken, Done, Kept, Ready, Stands, Wave, played
from fedml.errors import TaskFailed
from fedml.protocol.apps import FIRST_NODE, AppPlan, AppTerms
from fedml.protocol.messages import (
    Assignment,
    Blob,
    Declined,
    Failed,
    Privacy,
    RunId,
    SiteId,
    Trained,
    Training,
)
from fedml.protocol.operations import Counted, Receipt, RunInfo, RunState
from fedml.rounds.hosting import End, Opened
from fedml.rounds.round import Opening

_LONGEST = 30 * 86400.0  # seconds that a wave may take
_PATIENCE = 10.0  # seconds for a wave to be noted when the run is let go of
_AGAIN = 2.0  # seconds until a site that is busy is asked again
_log = structlog.get_logger()


@dataclass
class _Open:
    """The wave that is open: what came of each message so far."""

    wave: Wave
    opening: Opening
    at: float
    came: dict[SiteId, dict[str, str]] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)  # digests of replies
    again: set[SiteId] = field(default_factory=set)  # asked once more for what was not there


class AppHost:
    """Plays one app's run to its end. `changed` is called when `info` is worth another look."""

    def __init__(
        self,
        id: RunId,
        plan: AppPlan,
        *,
        desk: Desk,
        journal: Journal,
        holds: Holds,
        folder: Path,
        changed: Callable[[RunId], None],
    ) -> None:
        self._id, self._plan = id, plan
        self._desk, self._journal, self._holds = desk, journal, holds
        self._app, self._place = copy_of(folder, plan.app), run_folder(folder, id)
        self._changed = changed
        self._sites: tuple[SiteId, ...] = ()
        self._open: _Open | None = None
        self._settling: set[asyncio.Task[Mapping[str, object]]] = set()  # a wave that is noted
        self._bell = asyncio.Event()  # something has come, or somebody
        self._halted: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._draining = False
        self.at_rest = asyncio.Event()
        self.at_rest.set()
        self._status: tuple[RunState, str] = ("waiting", "")

    # --- what others want of a host -------------------------------------------------------------

    @property
    def info(self) -> RunInfo:
        """The run in one line, as it stands."""
        info, (state, detail) = run_info(self._journal, self._id, None), self._status
        if self._journal.runs[self._id].ended is not None:
            return info
        return replace(info, state=state, detail=detail)

    def stop(self, reason: str) -> None:
        """Ask the run to end."""
        if not self._halted.done():
            self._halted.set_result(reason)

    def drain(self) -> None:
        """Open no further wave."""
        self._draining = True

    def lost(self, site: SiteId, reason: str) -> None:
        """A site is away for longer than it may be."""
        self._came(site, reason=reason)

    def sites_changed(self) -> None:
        """Look again at who is here."""
        self._bell.set()

    async def answered(self, site: SiteId, order: Assignment, answer: Answer) -> None:
        """Take a site's answer in."""
        is_open = self._open and order.task == self._open.opening.task_id(site)
        if not is_open or self._open is None or site in self._open.came:
            return
        match answer:
            case Trained() if not self._holds.store.has(answer.update.digest):
                if site in self._open.again:
                    return self._came(site, reason="it does not hand in what it announces")
                self._open.again.add(site)  # gone with another's equal one, perhaps
                self._desk.remind(site, order.task)
            case Trained():
                self._holds.hold(answer.update.digest)
                self._open.held.append(answer.update.digest)
                self._desk.settle(site, order.task)
                self._came(site, path=str(self._holds.store.path(answer.update.digest).resolve()))
            case Declined(_, reason, for_now) if for_now:
                _log.info("site is busy", site=site, reason=one_line(reason))
                remind = partial(self._desk.remind, site, order.task)
                asyncio.get_running_loop().call_later(_AGAIN, remind)
            case Declined(_, reason) | Failed(_, reason):
                self._came(site, reason=one_line(reason))
            case _:
                self._came(site, reason="it answered with something that is no reply")

    def _came(self, site: SiteId, **what: str) -> None:
        if self._open is not None and site in self._open.opening.asked:
            self._open.came.setdefault(site, what)
            self._bell.set()

    # --- the run --------------------------------------------------------------------------------

    async def play(self, halted: str = "") -> None:
        """Carry the run on to its end; one that was `halted` is wound up."""
        if halted:
            self.stop(halted)
        work = asyncio.create_task(self._work())
        ends: list[asyncio.Future[End] | asyncio.Future[str]] = [work, self._halted]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                end = work.result()
            else:
                end = End("stopped", f"{self._halted.result()}; {self._count()}")
        finally:
            work.cancel()
            await asyncio.wait([work, *self._settling], timeout=_PATIENCE)
            self._close()
        self._forget_open(end.detail)
        await self._note(Ended(self._id, end.state, end.detail))
        if self._journal.runs[self._id].is_over:
            self._desk.conclude(self._id)
        _log.info("run ended", state=end.state, detail=end.detail)

    async def _work(self) -> End:
        if self._halted.done():
            await asyncio.Event().wait()
        self._sites = await self._gather()
        durable.make_folder(self._place)
        self._tell("running", "")
        async with played(self._place) as stage:
            while True:
                match await stage.hear():
                    case Done():
                        return End("done", f"kept in {APPS}/runs/{self._id}")
                    case Broken(failed):
                        return End("failed", one_line(failed))
                    case Stands(reason):
                        self._tell("waiting", f"{reason}; then restart the coordinator")
                        await asyncio.Event().wait()
                    case Ready():
                        stage.answer(self._part())
                    case Wave() as wave:
                        stage.answer(await self._carry(wave))
                    case Kept() as kept:
                        stage.answer(await self._settle(kept))

    async def _settle(self, kept: Kept) -> Mapping[str, object]:
        """End a wave; who stops the run meanwhile finds it over, and its sites told."""
        settling = asyncio.create_task(self._commit(kept))
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        return await asyncio.shield(settling)

    def _part(self) -> Mapping[str, object]:
        """Return what the ServerApp is to play."""
        return {
            "app": str(self._app),
            "digest": self._plan.app.digest,
            "config": dict(self._plan.config),
            "sites": len(self._sites),
            "seed": self._plan.seed,
            "committed": len(self._journal.runs[self._id].receipts),
        }

    def _count(self) -> str:
        return f"{len(self._journal.runs[self._id].receipts)} exchanges are committed"

    async def _gather(self) -> tuple[SiteId, ...]:
        """Return the run's sites, which are the same for ever once there are enough."""
        path = self._place / "sites.json"
        if path.exists():
            return tuple(SiteId(str(site)) for site in durable.read_json(path))
        while True:
            self._bell.clear()
            here = self._desk.running(self._plan.app)
            if len(here) >= self._plan.least and not self._draining:
                durable.make_folder(self._place)
                durable.replace(path, durable.dump_json(list(here)))
                return here
            self._tell("waiting", f"{len(here)} of {self._plan.least} sites are here that allow "
                       f"app {self._plan.app.name} {self._plan.app.digest[:12]}")  # fmt: skip
            await self._bell.wait()

    # --- one wave -------------------------------------------------------------------------------

    async def _carry(self, wave: Wave) -> Mapping[str, object]:
        """Have the sites asked; return what came of each message that was not kept before."""
        while self._draining:
            self.at_rest.set()
            await asyncio.Event().wait()  # until the coordinator goes down
        self.at_rest.clear()
        if any(not 0 <= order.site < len(self._sites) for order in wave.orders):
            raise TaskFailed("the ServerApp's program asks a site that there is not")
        asked = tuple(self._sites[order.site] for order in wave.orders)
        seconds = min(max(wave.timeout, 0.001), _LONGEST)
        opening = Opening(self._id, wave.wave, 1, asked, 1, seconds)
        history, now = self._journal.runs[self._id], time.time()
        if history.opened is None or history.lapsed or history.opened.opening != opening:
            await self._note(RoundOpened(self._id, Opened(opening, {}, now)))
        else:
            now = history.opened.at
        bind_contextvars(round=wave.wave)
        _log.info("wave opened", about=wave.about, sites=len(asked))
        self._open = _Open(wave, opening, now)
        self._desk.turns.take(self._id, asked)  # no other run opens a round where there is no room
        blobs = await self._send(wave, opening)
        try:
            await self._wait(wave, seconds)
        finally:
            for blob in blobs:
                self._holds.let_go(blob.digest)
        came = self._open.came
        return {"came": {str(order.site): came[self._sites[order.site]]
                         for order in wave.orders if self._sites[order.site] in came}}  # fmt: skip

    async def _send(self, wave: Wave, opening: Opening) -> list[Blob]:
        """Give each site that is to answer its order; return the blobs that they need."""
        blobs = dict[str, Blob]()
        for order in wave.orders:
            if order.is_kept:
                continue
            if order.path not in blobs:
                make = partial(_pieces, Path(order.path))
                put = partial(self._holds.put_pieces, make)
                blobs[order.path] = await insist(put, self._waits)
            site = self._sites[order.site]
            terms = AppTerms(FIRST_NODE + order.site, order.messages, self._plan.config)
            assignment = Assignment(
                task=opening.task_id(site),
                run=self._id,
                round=wave.wave,
                kind="train",
                recipe=self._plan.app,
                dataset=self._plan.app.name,
                model=blobs[order.path],
                training=Training(1.0, steps=1),  # of a recipe; an app has its own
                privacy=Privacy(),
                cohort=len(opening.asked),
                seed=order.seed,
                deadline=opening.deadline,
                app=terms.to_json(),
            )
            self._desk.assign(site, assignment)
            self._desk.expect(site)
        return list(blobs.values())

    async def _wait(self, wave: Wave, seconds: float) -> None:
        """Wait for what comes of each message; who is late has not replied."""
        assert self._open is not None
        due = {self._sites[order.site] for order in wave.orders if not order.is_kept}
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while due - self._open.came.keys():
                    self._bell.clear()
                    await self._bell.wait()
        for site in due - self._open.came.keys():
            self._came(site, reason=f"no reply within {seconds:g} s")

    async def _commit(self, kept: Kept) -> Mapping[str, object]:
        """The replies are on the disk: note that the wave is over, and have the sites forget."""
        here = self._open
        if here is None or kept.kept != here.opening.number:
            raise TaskFailed("the ServerApp's program speaks of a wave that is not open")
        names = {str(order.site): self._sites[order.site] for order in here.wave.orders}
        counted = tuple(
            Counted(site, 1.0, kept.digests[number], 0.0)
            for number, site in names.items()
            if kept.digests.get(number)
        )
        receipt = Receipt(
            run=self._id,
            round=here.opening.number,
            attempt=1,
            asked=here.opening.asked,
            counted=counted,
            missing={names[k]: one_line(why) for k, why in kept.reasons.items() if k in names},
            model=here.wave.orders[0].digest,
            opened=here.at,
            closed=time.time(),
            about=here.wave.about,
        )
        note = partial(self._journal.commit, self._id, receipt, None)
        await insist(partial(asyncio.to_thread, note), self._waits)
        telemetry.ROUNDS.labels("committed").inc()
        _log.info("wave closed", counted=len(counted), missing=dict(receipt.missing))
        unbind_contextvars("round")
        answered = {one.site for one in counted}
        for site in here.opening.asked:
            self._let_go(site, here.opening, counted=site in answered)
        self._close()
        self._desk.turns.keep(self._id, ())
        if self._desk.turns.yields(self._id):
            self._desk.turn_over()
        self.at_rest.set()
        self._tell("running", here.wave.about)
        return {}

    def _let_go(self, site: SiteId, opening: Opening, *, counted: bool) -> None:
        task = opening.task_id(site)
        if not counted:
            self._desk.cancel(site, task, "the run no longer waits for it")
        self._desk.forget(site, task, counted=counted)
        for digest in self._desk.leftovers(site, task):
            self._holds.store.abandon(digest, self._desk.door(site))
            self._holds.discard(digest)

    def _forget_open(self, reason: str) -> None:
        """Take back what was asked for and is not over."""
        for door, digest in self._desk.abandon(self._id, reason):
            self._holds.store.abandon(digest, door)
            self._holds.discard(digest)
        if opened := self._journal.runs[self._id].opened:  # perhaps not asked again since a restart
            for site in opened.opening.asked:
                self._desk.forget(site, opened.opening.task_id(site), counted=False)

    def _close(self) -> None:
        """Let go of the replies of the wave that was open."""
        if self._open is not None:
            for digest in self._open.held:
                self._holds.let_go(digest)
        self._open = None

    async def _note(self, entry: RoundOpened | Ended) -> None:
        note = partial(self._journal.append, entry)
        await insist(partial(asyncio.to_thread, note), self._waits)

    def _waits(self, reason: str) -> None:
        if reason:
            _log.warning("the run waits", reason=reason)
        self._tell("running", f"waits: {reason}" if reason else "")

    def _tell(self, state: RunState, detail: str) -> None:
        self._status = state, detail
        self._changed(self._id)


def _pieces(path: Path) -> list[bytes]:
    return [path.read_bytes()]
