"""Hosts a `Run` on virtual time: the production state machine, with no network and no waiting.

An answer arrives `delay` seconds after its task was sent, by the simulation's own clock; the
clock jumps from event to event, so a deadline of an hour costs nothing.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from cryptography.hazmat.primitives.poly1305 import Poly1305

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
)
from fedml.simulation.executors.base import Answer, Executor

Delay = Callable[[Task], float]  # seconds between sending a task and its answer


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
    return tuple(SiteStatus(site, True, (plan.recipe,), (card,)) for site in sites)


@dataclass
class Engine:
    """Plays one run to its end; `watch` sees each commit, and must have kept it when it returns."""

    run: Run
    executor: Executor
    sites: Sequence[SiteStatus] | Pool
    delay: Delay = lambda task: 0.0
    watch: Callable[[Commit], None] = lambda commit: None
    now: float = 0.0
    _agenda: list[tuple[float, int, Event]] = field(default_factory=list)
    _serial: itertools.count[int] = field(default_factory=itertools.count)
    _end: End | None = None
    _candidate: Candidate | None = None

    def play(self) -> Outcome:
        """Return the outcome; every run ends, for every round has a deadline."""
        self._act(self.run.open(self.now))
        self._act(self.run.handle(SitesChanged(_known(self.sites)), self.now))
        while self._end is None:
            self.now, _, event = heapq.heappop(self._agenda)
            self._act(self.run.handle(event, self.now))
        return Outcome(self._end, tuple(self.run.receipts), self._candidate, self.now)

    def _later(self, seconds: float, event: Event) -> None:
        heapq.heappush(self._agenda, (self.now + seconds, next(self._serial), event))

    def _act(self, commands: Iterable[Command]) -> None:
        tasks: list[Task] = []
        for command in commands:
            match command:
                case SendTask(task):
                    tasks.append(task)
                case ForgetTask():
                    pass  # nothing here outlives a crash
                case WakeAt(seconds, token):
                    self._later(seconds, Tick(token))
                case Commit():
                    self.watch(command)
                    self._later(0.0, Committed())
                case Candidate():
                    self._candidate = command
                case End():
                    self._end = command
                case Opened() | CancelTask():
                    pass  # no work is under way
        self._hand_out(tasks)

    def _hand_out(self, tasks: Sequence[Task]) -> None:
        delays = {task.id: self.delay(task) for task in tasks}
        for answer in self.executor.run(tasks) if tasks else ():
            for seconds, event in _arrivals(answer, delays):
                if seconds > 0:
                    self._later(seconds, event)
                else:  # counted as it comes, so that no cohort is ever held in memory
                    self._act(self.run.handle(event, self.now))


def _known(sites: Sequence[SiteStatus] | Pool) -> tuple[SiteStatus, ...] | Pool:
    return sites if isinstance(sites, Pool) else tuple(sites)


def _arrivals(answer: Answer, delays: Mapping[TaskId, float]) -> Iterator[tuple[float, Event]]:
    """Yield what comes of an answer, and after how many seconds; a stack's rows may part."""
    if not isinstance(answer, Stack):
        yield (delays[answer.task] if answer.task is not None else 0.0), _event(answer)
        return
    times = [delays[task] for task in answer.tasks]
    for seconds in sorted({*times}):
        some = [row for row, time in enumerate(times) if time == seconds]
        yield seconds, _event(answer.take(some))


def _event(answer: Answer) -> Event:
    match answer:
        case Stack():
            return StackArrived(answer, answer.digests())
        case Update():
            return UpdateArrived(answer, _fingerprint(answer))
        case Report():
            return ReportArrived(answer)
        case SiteLost():
            return answer


def _fingerprint(update: Update) -> str:
    """Return 64 hex digits that tell updates apart, at a seventh of what SHA-256 costs.

    Nobody forges bytes that never leave his machine, so a polynomial with a known key will do.
    """
    mark = Poly1305(b"fingerprints of simulated update")
    for name, part in (("", update.delta), *sorted(update.slots.items())):
        mark.update(name.encode())
        for buffer in part.buffers.values():
            mark.update(buffer.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return hashlib.sha256(mark.finalize()).hexdigest()
