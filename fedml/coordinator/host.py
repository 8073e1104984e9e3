"""The host of one run: carries out its commands against real sites, disk and clock.

It decides nothing. Every event is journalled or harmless to lose, so after a crash the same run
is hosted again from where the journal ends.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog
from structlog.contextvars import bind_contextvars, unbind_contextvars

from fedml import failpoints, telemetry
from fedml.coordinator import veil
from fedml.coordinator.desk import Answer, Desk
from fedml.coordinator.holds import Holds
from fedml.coordinator.intake import Intake
from fedml.coordinator.journal import Ended, Journal, RoundOpened
from fedml.coordinator.patience import insist
from fedml.coordinator.post import Post
from fedml.errors import MalformedMessage
from fedml.params import read
from fedml.protocol.messages import (
    Assignment,
    Blob,
    RunId,
    SecaggSaid,
    SiteId,
    TaskId,
    Trained,
)
from fedml.protocol.operations import Receipt, RunInfo
from fedml.protocol.tasks import Task
from fedml.rounds.hosting import (
    Candidate,
    Command,
    Commit,
    Committed,
    End,
    Event,
    ForgetTask,
    Opened,
    SitesChanged,
    StopAsked,
    Tick,
)
from fedml.rounds.masked import Relay, Said
from fedml.rounds.round import CancelTask, SendTask, SiteLost, WakeAt
from fedml.rounds.run import Run
from fedml.rounds.selection import Roll
from fedml.rounds.vigil import Vigil
from fedml.strategies import ServerState

_BETWEEN_LOOKS = 0.1  # seconds between two looks at all sites
_log = structlog.get_logger()
Register = Callable[[Run, Candidate], Awaitable[int]]


class Host:
    """Plays one run to its end. `changed` is called whenever `info` is worth another look.

    `grace` is how many seconds a resumed run waits for the sites of its last round.
    """

    def __init__(
        self,
        run: Run,
        *,
        desk: Desk,
        journal: Journal,
        holds: Holds,
        register: Register,
        changed: Callable[[RunId], None],
        grace: float = 0.0,
    ) -> None:
        self.run = run
        self._desk, self._journal, self._holds = desk, journal, holds
        self._register, self._changed = register, changed
        self._inbox: asyncio.Queue[Event] = asyncio.Queue()
        self._post = Post(holds, run.plan.wire)
        self._state: tuple[ServerState, Blob] | None = None  # the last one that was committed
        self._intake = Intake(desk, holds, self.tell, self._wait, self._masked)
        self._asked: tuple[SiteId, ...] = ()
        self._sent: dict[TaskId, tuple[str, ...]] = {}  # blobs of the tasks that are not over
        self._timers: list[asyncio.TimerHandle] = []
        self._looking: asyncio.TimerHandle | None = None
        self._vigil = Vigil(run.receipts)
        self._looked = -math.inf
        self._expected = frozenset(run.receipts[-1].asked if run.receipts else ())
        self._expected_until = time.monotonic() + grace
        self._draining = False
        self.at_rest = asyncio.Event()  # set while no round is open and nothing is to be done
        self._waits_for = ""  # why the next step is tried again and again

    @property
    def info(self) -> RunInfo:
        """The run in one line, as it stands."""
        info = run_info(self._journal, self.run.id, self.run)
        return replace(info, detail=f"waits: {self._waits_for}") if self._waits_for else info

    def tell(self, event: Event) -> None:
        """Feed the run an event."""
        self._inbox.put_nowait(event)

    def stop(self, reason: str) -> None:
        """Ask the run to end."""
        self.tell(StopAsked(reason))

    def drain(self) -> None:
        """Open no further round."""
        self._draining = True

    def lost(self, site: SiteId, reason: str) -> None:
        """A site is away for longer than it may be."""
        self.tell(SiteLost(site, reason))

    async def answered(self, site: SiteId, order: Assignment, answer: Answer) -> None:
        """Turn a site's answer into an event."""
        bind_contextvars(run=order.run, round=order.round)
        if isinstance(answer, SecaggSaid):
            self._said(site, answer)
        else:
            await self._intake.answered(site, order, answer)

    def _said(self, site: SiteId, answer: SecaggSaid) -> None:
        try:
            self.tell(veil.said(site, answer))
        except MalformedMessage as error:
            self.tell(SiteLost(site, f"message refused: {error}", task=answer.task))

    def _masked(self, site: SiteId, answer: Trained) -> Said:
        """Return masked words, mapped from their file."""
        terms = self.run.terms
        if terms is None:
            raise MalformedMessage("its round is over")
        return veil.masked(site, answer, self._holds.store.path(answer.update.digest), terms)

    async def play(self) -> End:
        """Carry out the run's commands until it ends."""
        loop = asyncio.get_running_loop()
        wait = max(0.0, self._expected_until - time.monotonic())
        self._timers.append(loop.call_later(wait + 0.05, self.sites_changed))
        try:
            again = map(SendTask, self.run.flight.orders())  # nobody here knows of them
            commands = deque([*again, *self._seated(self.run.open(time.time()))])
            while True:
                while commands:
                    command = commands.popleft()
                    step = partial(self._carry_out, command)
                    commands.extend(await insist(step, self._wait))
                    if isinstance(command, End):
                        return command
                self._changed(self.run.id)
                self._give_way()
                if not self.run.asked and self._inbox.empty():
                    self.at_rest.set()
                event = await self._inbox.get()
                self.at_rest.clear()
                commands.extend(await self._decide(event))
                self._intake.taken(event)
                if isinstance(event, SiteLost):
                    self._desk.dismiss(event.site, self.run.id, event.task)
                del event  # or an update would stay mapped while we wait
        finally:
            self._leave()

    def _leave(self) -> None:
        """Let go of all that the run has here: timers and blobs."""
        for timer in self._timers:
            timer.cancel()
        if self._looking is not None:
            self._looking.cancel()
        self._intake.close()
        for task in [*self._sent]:
            self._let_go(task)
        self._post.close()
        if self._state is not None:
            self._holds.let_go(self._state[1].digest)
        self.at_rest.set()

    def _wait(self, reason: str) -> None:
        if reason and not self._waits_for:
            _log.warning("the run waits", reason=reason)
        self._waits_for = reason
        self._changed(self.run.id)

    async def _decide(self, event: Event) -> list[Command]:
        """Let the run take an event in; an update is megabytes to add, so not on the loop."""
        now = time.time()
        if isinstance(event, SitesChanged) or (isinstance(event, Tick) and not self.run.asked):
            # on the loop: nobody else takes a seat between our look and the opening of a round
            commands = self.run.handle(self._pool(), now)
            if isinstance(event, Tick):
                commands += self.run.handle(event, now)
            commands = self._seated(commands)
        else:
            commands = await asyncio.to_thread(self.run.handle, event, now)
        failpoints.reach("event.taken")
        return commands

    def _pool(self) -> SitesChanged:
        """Return the sites as they are now, and as far as it is our turn."""
        if self._draining:  # no site for a further round, which must not cost the run its patience
            return SitesChanged(Roll(awaits_turn=True))
        return SitesChanged(self._desk.turns.pool(self.run, self._desk.statuses()))

    def _seated(self, commands: list[Command]) -> list[Command]:
        """Take the places of a round that opens, before anything else happens."""
        for command in commands:
            if isinstance(command, Opened):
                self._desk.turns.take(self.run.id, command.opening.asked)
        return commands

    def _give_way(self) -> None:
        """Let other runs have the sites of a round that is over, now that these know it is."""
        self._desk.turns.keep(self.run.id, self.run.held)
        if self._desk.turns.yields(self.run.id):
            self._desk.turn_over()

    async def _carry_out(self, command: Command) -> list[Command]:
        match command:
            case Opened():
                await asyncio.to_thread(self._journal.append, self._opened(command))
                self._tell_opened(command)
            case SendTask(task):
                await self._assign(task)
            case CancelTask(task, site, reason):
                self._desk.cancel(site, task, reason)
            case Relay(task, site, message):
                self._desk.tell(site, veil.told(task, message))
            case WakeAt(seconds, token):
                loop = asyncio.get_running_loop()
                self._timers.append(loop.call_later(seconds, self.tell, Tick(token)))
            case Commit():
                return await self._commit(command)
            case ForgetTask(task, site):
                self._forget(task, site)
            case Candidate():
                self._give_way()  # others need not wait until a version is made
                await self._candidate(command)
            case End():
                await self._end(command)
        return []

    async def _assign(self, task: Task) -> None:
        """Give a site its task, and hold its model's blobs as long as the site may want them."""
        order = await self._assignment(task)
        blobs = (order.model, *(parcel.blob for parcel in order.parcels))
        self._let_go(task.id)
        self._sent[task.id] = tuple(blob.digest for blob in blobs)
        for digest in self._sent[task.id]:
            self._holds.hold(digest)
        self._desk.assign(task.site, order)

    def _let_go(self, task: TaskId) -> None:
        for digest in self._sent.pop(task, ()):
            self._holds.let_go(digest)

    def _forget(self, task: TaskId, site: SiteId) -> None:
        self._let_go(task)
        counted = was_counted(self.run.receipts[-1], site)
        self._desk.forget(site, task, counted=counted)
        for digest in self._desk.leftovers(site, task):
            self._holds.store.abandon(digest, self._desk.door(site))
            self._holds.discard(digest)

    async def _end(self, end: End) -> None:
        await asyncio.to_thread(self._journal.append, Ended(self.run.id, end.state, end.detail))
        if self._journal.runs[self.run.id].is_over:
            self._desk.conclude(self.run.id)
        _log.info("run ended", state=end.state, detail=end.detail)

    def _opened(self, command: Opened) -> RoundOpened:
        """Note who is asked; return the entry that must be on the disk before they are."""
        fresh = (s for s in command.opening.asked if s not in self.run.flight.tasks)
        self._asked = tuple(fresh) or command.opening.asked
        return RoundOpened(self.run.id, command, self._data())

    def _tell_opened(self, command: Opened) -> None:
        opening = command.opening
        bind_contextvars(round=opening.number)
        _log.info("round opened", kind=opening.kind, sites=len(opening.asked))

    async def _commit(self, command: Commit) -> list[Command]:
        """Put a round's end on the disk, with the next round's opening: one wait for the disk.

        What the run makes of it is carried out only then.
        """
        receipt, state, file = command.receipt, None, None
        self._post.forget()
        if command.state is not None:
            state, file = await self._keep(command.state)
        self.run.handle(self._pool(), time.time())  # others may wait by now: a commit comes first
        commands = self._seated(self.run.handle(Committed(state), time.time()))
        opened = [command for command in commands if isinstance(command, Opened)]
        entries = [self._opened(command) for command in opened]
        note = partial(self._journal.commit, self.run.id, receipt, file, *entries)
        # not the whole step again on a full disk: the run has taken its commit in
        await insist(partial(asyncio.to_thread, note), self._wait)
        failpoints.reach("round.committed")
        ended = "committed" if receipt.model else "failed"
        telemetry.ROUNDS.labels(ended).inc()
        _log.info("round closed", round=receipt.round, kind=receipt.kind, outcome=ended,
                  counted=len(receipt.counted), missing=dict(receipt.missing),
                  scores=dict(receipt.scores))  # fmt: skip
        for site in self._vigil.take(receipt):
            telemetry.ALERTS.labels("damped").inc()
            _log.warning("alert", site=site, reason=self._vigil.alert(site))
        unbind_contextvars("round")
        for next_round in opened:
            self._tell_opened(next_round)
        return [command for command in commands if not isinstance(command, Opened)]

    async def _keep(self, state: ServerState) -> tuple[ServerState, Path]:
        """Encode a new state once: to be committed, and to be sent out as the next brief.

        It is returned as its file says, which takes no memory, and with the file.
        """
        blob = await self._holds.put({"": state.params, **state.slots})
        if self._state is not None:
            self._holds.let_go(self._state[1].digest)
        path = self._holds.store.path(blob.digest)
        parts = await asyncio.to_thread(read, path)
        parts[""].known.update(state.params.known)
        mapped = ServerState(parts.pop(""), parts, state.step)
        self._state = (mapped, blob)
        return mapped, path

    async def _candidate(self, candidate: Candidate) -> None:
        """Register the model once; a replay after a crash finds the version noted."""
        if not self._journal.runs[self.run.id].version:
            version = await self._register(self.run, candidate)
            _log.info("version registered", model=self.run.plan.model, version=version)

    async def _assignment(self, task: Task) -> Assignment:
        plan = self.run.plan
        model, parcels = await self._post.encoded(task.brief, self._state, self._asked)
        terms, summed = self.run.terms, plan.buffer or len(self._asked)
        return Assignment(
            task=task.id,
            run=task.run,
            round=task.round,
            kind=task.kind,
            recipe=plan.recipe,
            dataset=plan.dataset,
            model=model,
            training=plan.training,
            privacy=plan.privacy,
            rule=task.brief.rule,
            settings=task.brief.settings,
            cohort=max(summed, terms.threshold) if terms else summed,
            seed=plan.task_seed(task.round, task.site),
            deadline=plan.cohort.deadline,
            parcels=parcels,
            up="" if plan.wire.up == "exact" else plan.wire.up,
            keep_model=self._post.sends_deltas,
            masking=veil.masking(terms, plan.secagg) if terms else "",
        )

    def _data(self) -> dict[str, str]:
        """Return the asked sites' dataset digests as they are now, for the lineage."""
        name, asked = self.run.plan.dataset, frozenset(self._asked)
        return {
            str(status.site): card.digest
            for status in self._desk.statuses()
            for card in status.datasets
            if status.site in asked and card.name == name
        }

    def sites_changed(self) -> None:
        """Have the run look at who is here: at once, or a moment after its last look.

        Each look is at every site, so a thousand that come within seconds share a few.
        """
        if self._looking is None:
            loop = asyncio.get_running_loop()
            when = max(loop.time(), self._looked + _BETWEEN_LOOKS)
            self._looking = loop.call_at(when, self._look)

    def _look(self) -> None:
        """Tell the run who is here now; after a restart, once those it asked last are back.

        A coordinator that has just come back would else open a round with the first few.
        """
        self._looking, self._looked = None, asyncio.get_running_loop().time()
        statuses = self._desk.statuses()
        here = {status.site for status in statuses if status.connected}
        if self._expected - here and time.monotonic() < self._expected_until:
            return
        self._expected = frozenset()
        self.tell(SitesChanged(()))  # who is here is looked up when it is handled


def was_counted(receipt: Receipt, site: SiteId) -> bool:
    """True if the round moved the model, and `site` had a part in it."""
    return bool(
        receipt.kind == "train"
        and receipt.model
        and any(counted.site == site for counted in receipt.counted)
    )


def run_info(journal: Journal, id: RunId, run: Run | None) -> RunInfo:
    """Return a run in one line: from its host while it is played, else from the journal."""
    history = journal.runs[id]
    done = [r for r in history.receipts if r.kind == "train" and r.model]
    scored = [r for r in history.receipts if r.scores]
    model, rounds = history.title
    info = RunInfo(
        id,
        model,
        "queued",
        len(done),
        rounds,
        history.submitted.at,
        version=history.version,
        scores=scored[-1].scores if scored else {},
        starts=history.submitted.starts,
    )
    if history.ended:
        return replace(info, state=history.ended.state, detail=history.ended.detail)
    if run is not None:
        state, detail = run.status
        if state in ("done", "failed", "stopped"):  # decided, and not yet on the disk
            state, detail = "running", f"ending: {detail}"
        return replace(info, state=state, detail=detail)
    return info
