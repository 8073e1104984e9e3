"""Hosts a `Run` on virtual time: the production state machine, with no network and no waiting.

A world says how many seconds each answer takes, by the simulation's own clock, and which sites
are there; the clock jumps from event to event, so a deadline of an hour costs nothing.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from fedml.errors import ConfigError
from fedml.privacy.shares import grain_of
from fedml.protocol.messages import DatasetCard, SiteId, TaskId
from fedml.protocol.operations import Receipt
from fedml.protocol.tasks import Report, Stack, Task, Update
from fedml.rounds import (
    CancelTask,
    Candidate,
    Command,
    Commit,
    Committed,
    End,
    Event,
    ForgetTask,
    Opened,
    Plan,
    Pool,
    Relay,
    ReportArrived,
    Run,
    SendTask,
    SiteLost,
    SitesChanged,
    SiteStatus,
    StackArrived,
    Tick,
    UpdateArrived,
    WakeAt,
    about_of,
)
from fedml.simulation.executors.base import Answer, Executor
from fedml.simulation.flight import Due, Flight, cut
from fedml.simulation.marks import mark_of, marks_of
from fedml.simulation.veil import Veil
from fedml.simulation.world import Fate, Instant, World
from fedml.strategies import buffering_of


@dataclass(frozen=True)
class Outcome:
    """What a run came to: how it ended, its receipts, its model if there is one.

    `seconds` is the virtual time it took.
    """

    end: End
    receipts: tuple[Receipt, ...]
    candidate: Candidate | None
    seconds: float


def statuses(plan: Plan, sites: Iterable[SiteId]) -> tuple[SiteStatus, ...] | Pool:
    """Return `sites` as connected, with the plan's recipe and dataset; a crowd is its own pool."""
    if isinstance(sites, Pool):
        return sites
    card = DatasetCard(plan.dataset, 1, "0" * 64)
    return tuple(SiteStatus(site, True, (plan.recipe,), (card,), can_mask=True) for site in sites)


@dataclass
class Engine:
    """Plays one run to its end; `watch` sees each commit, and must have kept it when it returns."""

    run: Run
    executor: Executor
    sites: Sequence[SiteStatus] | Pool
    world: World = field(default_factory=Instant)
    watch: Callable[[Commit], None] = lambda commit: None
    now: float = 0.0
    flight: Flight = field(default_factory=Flight)  # of a run that takes updates as they come
    _agenda: list[tuple[float, int, Event | Due]] = field(default_factory=list)
    _serial: itertools.count[int] = field(default_factory=itertools.count)
    _end: End | None = None
    _candidate: Candidate | None = None
    _away: Mapping[SiteId, float] | None = None  # as the run was last told
    _look_at: float = -1.0  # when it is looked who is back, if the run waits for sites
    _veil: Veil | None = None  # of a run whose sums are masked

    def __post_init__(self) -> None:
        if not self.run.plan.secagg.is_on:
            return
        if isinstance(self.sites, Pool):
            raise ConfigError("secagg with a crowd: use a population whose sites are listed")
        plan, sites = self.run.plan, [status.site for status in self.sites]
        grain = grain_of(plan.training, plan.privacy)
        self._veil = Veil(plan.secagg, sites, partial(about_of, plan), grain)
        self.run.enrol(self._veil.roster)

    def play(self) -> Outcome:
        """Return the outcome; every run ends, for every round has a deadline."""
        self._take_up()
        self._act(self.run.open(self.now))
        self._look()
        while self._end is None:
            self._await_sites()
            self.now, _, event = heapq.heappop(self._agenda)
            if isinstance(event, Due):
                self._land(event)
                continue
            if isinstance(event, Committed | SitesChanged):  # a round may open
                self._look()
            if not isinstance(event, SitesChanged):
                self._feed(event)
        return Outcome(self._end, tuple(self.run.receipts), self._candidate, self.now)

    def _look(self) -> None:
        """Tell the run who is there, if that has changed."""
        if isinstance(self.sites, Pool):  # a crowd is always there
            if self._away is None:
                self._act(self.run.handle(SitesChanged(self.sites), self.now))
            self._away = {}
            return
        away = self.world.away((status.site for status in self.sites), self.now)
        if self._away is None or away.keys() != self._away.keys():
            there = [replace(s, connected=False) if s.site in away else s for s in self.sites]
            self._act(self.run.handle(SitesChanged(tuple(there if away else self.sites)), self.now))
        self._away = away

    def _await_sites(self) -> None:
        """While the run waits for sites, look again when the next one is back."""
        if self._away and self._look_at <= self.now and self.run.status[0] == "waiting":
            self._look_at = max(min(self._away.values()), self.now + 1.0)
            self._later(self._look_at - self.now, SitesChanged(()))

    def _take_up(self) -> None:
        """Go on with what was in flight at a checkpoint; first what had landed by then."""
        now = self.now
        for due in self.flight.dues.values():
            heapq.heappush(self._agenda, (due.at, next(self._serial), due))
        while self._agenda and self._agenda[0][0] <= now:
            _, _, first = heapq.heappop(self._agenda)
            if isinstance(first, Due):
                self._land(first)

    def _land(self, first: Due) -> None:
        """Let the run have what is due now: `first`, and what comes right after it."""
        dues = [first]
        while self._agenda and self._agenda[0][0] == first.at:
            following = self._agenda[0][2]
            if not isinstance(following, Due):
                break
            dues.append(following)
            heapq.heappop(self._agenda)
        for answer in self.flight.land(dues, self.executor):
            for event in _singly(answer) if self._veil else (_event(answer),):
                self._feed(event)

    def _later(self, seconds: float, event: Event | Due) -> None:
        heapq.heappush(self._agenda, (self.now + seconds, next(self._serial), event))

    def _act(self, commands: Iterable[Command]) -> None:
        tasks: list[Task] = []
        for command in commands:
            match command:
                case SendTask(task):
                    tasks.append(task)
                case WakeAt(seconds, token):
                    self._later(seconds, Tick(token))
                case Commit():
                    self._hand_out(tasks)  # of a round that was over as soon as it opened
                    tasks = []
                    self.watch(command)
                    self._later(0.0, Committed())
                case Candidate():
                    self._candidate = command
                case End():
                    self._end = command
                case Opened(opening) if self._veil:
                    self._veil.open(opening)
                case Relay():
                    self._relay(command)
                case Opened() | CancelTask() | ForgetTask():
                    self._let_go(command)
        self._hand_out(tasks)

    def _let_go(self, command: Opened | CancelTask | ForgetTask) -> None:
        """Do nothing more about a task that is over; and nothing here outlives a crash."""
        if not isinstance(command, Opened):
            self.flight.dues.pop(command.task, None)

    def _relay(self, relay: Relay) -> None:
        assert self._veil, "a run that relays what nobody is there for"
        if said := self._veil.hear(relay):
            self._act(self.run.handle(said, self.now))

    def _feed(self, event: Event) -> None:
        """Let the run take an event in; what a site answers is masked first, if sums are."""
        if self._veil and isinstance(event, UpdateArrived):
            event = self._veil.mask(event.update)
        elif self._veil and isinstance(event, ReportArrived):
            event = self._veil.mask(event.report)
        self._act(self.run.handle(event, self.now))

    def _hand_out(self, tasks: Sequence[Task]) -> None:
        ready: dict[TaskId, float] = {}
        work: list[Task] = []
        if veil := self._veil:
            for task in tasks:
                self._act(self.run.handle(veil.begin(task), self.now))
        buffered = buffering_of(self.run.plan.strategy) is not None
        for task, fate in zip(tasks, self.world.fates(tasks, self.now), strict=True):
            if buffered:
                due = Due(_work(task, fate), self.now + fate.seconds, fate.lost)
                self.flight.dues[task.id] = due
                self._later(fate.seconds, due)
                continue
            if fate.seconds >= self.run.plan.cohort.deadline:
                continue  # cancelled before it is answered
            if fate.lost:
                self._later(fate.seconds, SiteLost(task.site, fate.lost, task=task.id))
                continue
            ready[task.id] = fate.seconds
            work.append(_work(task, fate))
        for answer in self.executor.run(work) if work else ():
            for seconds, event in _arrivals(answer, ready, whole=self._veil is None):
                if seconds > 0:
                    self._later(seconds, event)
                else:  # counted as it comes, so that no cohort is ever held in memory
                    self._feed(event)


def _arrivals(
    answer: Answer, ready: Mapping[TaskId, float], *, whole: bool
) -> Iterator[tuple[float, Event]]:
    """Yield what comes of an answer, and after how many seconds; a stack's rows may part.

    They all do unless the stack may stay `whole`.
    """
    if isinstance(answer, Stack) and not whole:
        yield from zip(map(ready.__getitem__, answer.tasks), _singly(answer), strict=True)
        return
    if not isinstance(answer, Stack):
        yield (ready[answer.task] if answer.task is not None else 0.0), _event(answer)
        return
    rows: dict[float, list[int]] = {}
    for row, task in enumerate(answer.tasks):
        rows.setdefault(ready[task], []).append(row)
    for seconds, some in rows.items():
        yield seconds, _event(answer.take(some))


def _singly(answer: Answer) -> Iterator[Event]:
    """Yield what comes of an answer, each row of a stack by itself."""
    if isinstance(answer, Stack):
        yield from (UpdateArrived(answer.update(row)) for row in range(len(answer)))
    else:
        yield _event(answer)


def _work(task: Task, fate: Fate) -> Task:
    return task if fate.work == 1 else cut(task, fate.work)


def _event(answer: Answer) -> Event:
    match answer:
        case Stack():
            return StackArrived(answer, marks_of(answer))
        case Update():
            return UpdateArrived(answer, mark_of(answer))
        case Report():
            return ReportArrived(answer)
        case SiteLost():
            return answer
