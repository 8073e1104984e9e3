"""A region's share of a round as a state machine: its leaves' updates as exact sums.

    unknown -> waiting -> summed, in the sum that is open -> in a sealed sum
                       -> missing

Pure, as `round` is. What makes an update count, and what a leaf is told that does not, is the
same as in a round that asks the leaves itself; a sum is sealed once nobody is waited for. Leaves
that are asked later go into a sum of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedml.errors import MalformedMessage, MalformedUpdate
from fedml.protocol.messages import Lot, Summand, TaskId
from fedml.protocol.tasks import Brief, Report, Sum, Update
from fedml.rounds.answers import Updates
from fedml.rounds.round import DeadlinePassed, ReportArrived, SiteLost, UpdateArrived
from fedml.strategies import WeightedMean, reports


@dataclass(frozen=True)
class Ask:
    """Give the lot's leaf its task; it does the work once, however often it is asked."""

    lot: Lot


@dataclass(frozen=True)
class Lose:
    """Tell the parent that a leaf will not answer its task; `final` as in `SiteLost`."""

    lot: Lot
    reason: str
    final: bool = False


@dataclass(frozen=True)
class Pass:
    """Tell the parent what a leaf reports, as it is."""

    report: Report


@dataclass(frozen=True)
class Seal:
    """Keep this sum, and hand it in."""

    total: Sum


@dataclass(frozen=True)
class Deliver:
    """Hand in a sealed sum once more: the parent still waits for all that is in it."""

    tasks: frozenset[TaskId]


@dataclass(frozen=True)
class Discard:
    """Forget a sealed sum: it holds what the parent no longer waits for."""

    tasks: frozenset[TaskId]


Event = UpdateArrived | ReportArrived | SiteLost | DeadlinePassed
Step = Ask | Lose | Pass | Seal | Deliver | Discard
_LATE = "no answer in time for its region"


class Share(Protocol):
    """A region's part of one round, of either kind."""

    def ask(self, lots: Sequence[Lot]) -> list[Step]:
        """Take in what the parent waits for, again or for the first time."""

    def handle(self, event: Event) -> list[Step]:
        """Take in an answer, a loss or the deadline; what nobody waits for changes nothing."""

    def take_back(self, tasks: Iterable[TaskId]) -> list[Step]:
        """The parent waits for these no longer."""


class Scoring:
    """The share of an evaluation: reports are small, and go up one by one as they come."""

    def __init__(self) -> None:
        self._waiting: dict[TaskId, Lot] = {}

    def ask(self, lots: Sequence[Lot]) -> list[Step]:
        """Ask each again: a leaf keeps its report until it is told to forget it."""
        self._waiting.update({lot.task: lot for lot in lots})
        return [Ask(lot) for lot in lots]

    def handle(self, event: Event) -> list[Step]:
        """Pass on a report, once, or that there will be none."""
        match event:
            case ReportArrived(report):
                lot = self._waiting.get(report.task)
                if lot is None or lot.site != report.site:
                    return []
                del self._waiting[report.task]
                return [Pass(report)]
            case SiteLost(site, reason, final, task):
                gone = [x for x in self._waiting.values() if x.site == site]
                gone = [x for x in gone if task in (None, x.task)]
            case DeadlinePassed():
                gone, reason, final = [*self._waiting.values()], _LATE, False
            case UpdateArrived(update):
                gone = [x for x in self._waiting.values() if x.task == update.task]
                reason, final = "answer refused: it is an update, not a report", False
        for lot in gone:
            del self._waiting[lot.task]
        return [Lose(lot, reason, final) for lot in gone]

    def take_back(self, tasks: Iterable[TaskId]) -> list[Step]:
        """Wait for them no longer."""
        for task in tasks:
            self._waiting.pop(task, None)
        return []


class Summing:
    """The share of a training round: what became of each task that the leaves were given."""

    def __init__(
        self,
        number: int,
        brief: Brief,
        known: Iterable[Lot] = (),
        sealed: Iterable[frozenset[TaskId]] = (),
        *,
        coarse: bool = False,
    ) -> None:
        """Take up round `number`, with lots that were `known` and `sealed` before a restart.

        If `coarse`, deltas are rounded as in a round that asks the leaves itself.
        Raises `ConfigError` if the brief's rule is not installed here.
        """
        self._number, self._brief, self._reports = number, brief, reports(brief)
        self._coarse = coarse
        self._lots = {lot.task: lot for lot in known}
        self._waiting: dict[TaskId, Lot] = {}
        self._missing: dict[TaskId, tuple[str, bool]] = {}
        self._sealed = set(sealed)
        self._open: dict[TaskId, Summand] = {}
        self._answers = self._anew()

    def _anew(self) -> Updates:
        return Updates(WeightedMean(), self._reports, coarse=self._coarse)

    def ask(self, lots: Sequence[Lot]) -> list[Step]:
        """Take in what the parent waits for, again or for the first time."""
        wanted = {lot.task for lot in lots}
        steps: list[Step] = []
        for tasks in [tasks for tasks in self._sealed if tasks & wanted]:
            if tasks <= wanted:
                steps.append(Deliver(tasks))
            else:
                self._sealed.discard(tasks)
                steps.append(Discard(tasks))
        known = {*self._waiting, *self._open}.union(*self._sealed)
        for lot in lots:
            self._lots[lot.task] = lot
            if lot.task in self._missing:
                steps.append(Lose(lot, *self._missing[lot.task]))
            elif lot.task not in known:
                steps += self._ask(lot)
        return steps

    def _ask(self, lot: Lot) -> list[Step]:
        self._waiting[lot.task] = lot
        return [Ask(lot)]

    def handle(self, event: Event) -> list[Step]:
        """Take in an answer, a loss or the deadline; what nobody waits for changes nothing."""
        match event:
            case UpdateArrived(update, digest):
                lot = self._waiting.get(update.task)
                if lot is None or update.site != lot.site:
                    return []
                return self._count(lot, update, digest)
            case ReportArrived(report):
                gone = [x for x in self._waiting.values() if x.task == report.task]
                return self._lose(gone, "answer refused: it is a report, not an update")
            case SiteLost(site, reason, final, task):
                gone = [x for x in self._waiting.values() if x.site == site]
                gone = [x for x in gone if task in (None, x.task)]
                return self._lose(gone, reason, final=final)
            case DeadlinePassed():
                return self._lose([*self._waiting.values()], _LATE) or self._settle()

    def _count(self, lot: Lot, update: Update, digest: str) -> list[Step]:
        try:
            if update.round != self._number:
                raise MalformedMessage(f"it is for round {update.round}")
            self._answers.add(update, self._brief)
        except MalformedMessage as error:
            return self._lose([lot], f"answer refused: {error}")
        del self._waiting[lot.task]
        self._open[lot.task] = Summand(
            lot.site, lot.task, update.weight, digest, update.metrics, update.epsilon
        )
        return self._settle()

    def take_back(self, tasks: Iterable[TaskId]) -> list[Step]:
        """The parent waits for these no longer; what they were summed with is asked for anew.

        Nothing is sealed here: the parent takes a whole round back task by task.
        """
        back, again, steps = frozenset(tasks), set[TaskId](), list[Step]()
        for table in (self._waiting, self._missing, self._lots):
            for task in back & table.keys():
                del table[task]
        for sealed in [sealed for sealed in self._sealed if sealed & back]:
            self._sealed.discard(sealed)
            steps.append(Discard(sealed))
            again |= sealed
        if back & self._open.keys():
            again |= self._open.keys()
            self._open, self._answers = {}, self._anew()
        for task in sorted(again & self._lots.keys()):
            steps += self._ask(self._lots[task])
        return steps

    def _lose(self, lots: Sequence[Lot], reason: str, *, final: bool = False) -> list[Step]:
        for lot in lots:
            del self._waiting[lot.task]
            self._missing[lot.task] = reason, final
        told: list[Step] = [Lose(lot, reason, final) for lot in lots]
        return told + self._settle() if lots else []

    def _settle(self) -> list[Step]:
        """Seal the open sum if nobody is waited for."""
        if self._waiting or not self._open:
            return []
        summands = [self._open[task] for task in sorted(self._open)]
        answers, self._open, self._answers = self._answers, {}, self._anew()
        try:
            parts, reach = answers.total()
        except MalformedUpdate as error:
            self._missing.update({s.task: (str(error), False) for s in summands})
            return [Lose(self._lots[s.task], str(error)) for s in summands]
        self._sealed.add(frozenset(s.task for s in summands))
        return [Seal(Sum(self._number, tuple(summands), parts, reach))]
