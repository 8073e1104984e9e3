"""A round that takes updates as they come: over when a buffer is full, whoever still works.

What the slower sites work on is carried into the next round, and counts there for as much as its
age allows. Which updates a round's buffer held is in its receipt; in which order they came
changes no bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedml.params import Params
from fedml.protocol.messages import RunId, SiteId, TaskId
from fedml.protocol.operations import Receipt, round_of
from fedml.protocol.tasks import Brief, Stack, Task
from fedml.rounds.answers import TODAY, Lag, Lags
from fedml.rounds.round import (
    Account,
    CancelTask,
    Command,
    Event,
    Kind,
    Opening,
    Round,
    SiteLost,
    StackArrived,
    UpdateArrived,
)
from fedml.rounds.selection import Muster, Pool, Roll, Selection
from fedml.strategies import Buffering, Reducer

Early = UpdateArrived | StackArrived | SiteLost


class BufferedRound(Round):
    """Closes with `size` updates, of this round's tasks or of those that it carries over.

    At its deadline a quorum is enough. The tasks that are open then are `carried` on, but for
    those that could only come too late; a round that fails, or is the `last`, carries none on.
    """

    def __init__(
        self,
        opening: Opening,
        reducer: Reducer,
        reports: frozenset[str],
        buffering: Buffering,
        *,
        last: bool,
        coarse: bool,
        lags: Lags,
    ) -> None:
        """Make a round; `lags` as `Flight.lags` tells them, the rest as for any round."""
        super().__init__(opening, reducer, reports, coarse=coarse, lags=lags)
        self._size = buffering.size or opening.quorum
        self._most, self._last = buffering.most, last
        self._carried: dict[SiteId, TaskId] = {}
        self.surplus: list[Early] = []  # came when the buffer was full

    def handle(self, event: Event) -> list[Command]:
        """Take one event in; of a stack no more than there is room for."""
        if not isinstance(event, StackArrived):
            return super().handle(event)
        stack, digests = event.stack, event.digests
        commands: list[Command] = []
        rows = self._due(stack)
        while rows and not self._over:  # again only if some were refused
            room = self._size - len(self._counted)
            first, rows = rows[:room], rows[room:]
            commands += super().handle(_some(stack, digests, first))
        if rows:
            self.surplus.append(_some(stack, digests, rows))
        return commands

    def _is_settled(self) -> str:
        if len(self._counted) >= self._size:
            return "not waited for: the run's last buffer is full"
        return super()._is_settled()

    def _end(self, reason: str, *, abandoned: bool = False) -> list[Command]:
        number, cancels = self.opening.number, list[Command]()
        goes_on = not (abandoned or self._last or len(self._counted) < self.opening.quorum)
        for site in self.opening.asked if goes_on else ():
            if site not in self._waiting:
                continue
            task, since = self.opening.task_id(site), self.opening.round_of(site)
            if number + 1 - since > self._most:
                why = f"it works on round {since}, and would be more than {self._most} rounds late"
                self._lose(site, why)
                cancels.append(CancelTask(task, site, why))
            else:
                self._waiting.discard(site)
                self._carried[site] = task
        return [*cancels, *super()._end(reason, abandoned=abandoned)]

    def _account(self) -> Account:
        opening = self.opening
        stale = [s for s in opening.asked if s in self._counted]
        return replace(
            super()._account(),
            stale={s: opening.task_id(s) for s in stale if opening.round_of(s) < opening.number},
            carried={s: self._carried[s] for s in opening.asked if s in self._carried},
        )


class Flight:
    """What a run's sites work on across rounds, what they were sent, and what came too early.

    Which tasks these are is in the receipts alone, so a restart finds them there; the briefs are
    what a host must keep.
    """

    def __init__(self, run: RunId) -> None:
        self._run = run
        self.tasks: dict[SiteId, TaskId] = {}
        self.briefs: dict[int, Brief] = {}  # by round
        self.early: list[Early] = []  # between two training rounds

    def note(self, receipt: Receipt) -> None:
        """Take in the next receipt of the run."""
        if receipt.kind == "train":
            self.tasks = {SiteId(s): TaskId(task) for s, task in receipt.carried.items()}
            self.briefs = {number: self.briefs[number] for number in self.rounds & {*self.briefs}}

    @property
    def rounds(self) -> set[int]:
        """The rounds whose briefs the sites in flight work on."""
        return {round_of(self._run, task) for task in self.tasks.values()}

    def hold(self, event: object) -> bool:
        """Keep what came between two training rounds for the next; False if it is of no such."""
        if isinstance(event, Early):
            self.early.append(event)
        return isinstance(event, UpdateArrived | StackArrived)

    def take_early(self) -> Sequence[Early]:
        """Return, once, what came early, in order."""
        early, self.early = self.early, []
        return early

    def choose(
        self, kind: Kind, number: int, quorum: int, pool: Pool, muster: Muster
    ) -> Selection | None:
        """Return whom to ask, beside those in flight; None if they are too few together.

        Those in flight train on, and are spared scoring where the others are enough for it.
        """
        if kind == "evaluate" or not self.tasks:
            if muster.ready < quorum:
                return None
            found = muster.scorers(number) if kind == "evaluate" else muster.cohort(number)
            idle = tuple(site for site in found.asked if site not in self.tasks)
            if len(idle) < quorum or len(idle) == len(found.asked):
                return found
            spared = {s: why for s, why in self.reasons().items() if s in found.asked}
            return Selection(idle, {**found.left_out, **spared})
        if isinstance(pool, Roll) and (pool.awaits_turn or not pool.statuses):
            return None  # nobody was heard of yet, or may be asked
        chosen = muster.cohort(number, self.reasons())
        return chosen if len(chosen.asked) + len(self.tasks) >= quorum else None

    def reasons(self) -> Mapping[str, str]:
        """Say of each site in flight why it is asked for nothing else."""
        return {
            site: f"it still works on round {round_of(self._run, task)}"
            for site, task in self.tasks.items()
        }

    def lags(self, buffering: Buffering, number: int) -> Lags:
        """Return what becomes in round `number` of an update made from an older model.

        That round's brief must be here.
        """
        today = self.briefs[number].params
        ways: dict[int, Params] = {}

        def lag(since: int) -> Lag:
            if since == number:
                return TODAY
            if buffering.mixes_models and since not in ways:
                ways[since] = self.briefs[since].params - today
            return Lag(buffering.discount(number - since), ways.get(since))

        return lag

    def orders(self) -> tuple[Task, ...]:
        """Return the tasks as they were sent, for a host that has forgotten them."""
        return tuple(
            Task(task, self._run, number, site, "train", self.briefs[number])
            for site, task in self.tasks.items()
            for number in (round_of(self._run, task),)
        )


def _some(stack: Stack, digests: tuple[str, ...], rows: Sequence[int]) -> StackArrived:
    told = tuple(digests[row] for row in rows) if digests else ()
    return StackArrived(stack.take(rows), told)
