"""One worker process a core: the executor for models that a core trains well by itself."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from fedml.errors import ConfigError
from fedml.learning.gradients import Precision
from fedml.learning.recipe import Recipe
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Brief, Task
from fedml.rounds import Plan, SiteLost
from fedml.simulation.executors.base import Answer, Holding, Memory, count_rows
from fedml.simulation.executors.hand import Board, Hand, Job, post
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.machine import usable_cores

_TRIES = 2  # workers that may die of a task before its site is given up
_AHEAD = 2  # tasks in a worker's hands, so that it never waits for the next


@dataclass
class Processes:
    """Spreads tasks over forked workers of one thread each, the longest first.

    With `workers` None there is one for every core this process may use, but none more than
    sites. Answers have the bytes of an `Inline` with one thread. Workers start at birth, before
    this process has threads of its own, and end with it, however it ends. A task whose worker
    dies goes to another once; then its site is lost, and a new worker takes the place.
    """

    plan: Plan
    recipe: Recipe
    holdings: Mapping[SiteId, Holding]
    memory: Memory = field(default_factory=Memory)
    workers: int | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"executor.workers {self.workers}: must be 1 or more, or null")
        self._inline = Inline(
            self.plan, self.recipe, self.holdings, Memory(), precision=self.precision
        )
        self._hands: list[Hand] = []
        self._boards = 0
        weakref.finalize(self, _dismiss, self._hands, os.getpid())
        self._fill_up()

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Yield answers as they come. Whoever stops listening ends the work under way."""
        backlog = deque(Job(task) for task in self._longest_first(tasks))
        boards: dict[int, Board] = {}
        self._fill_up()
        try:
            while backlog or any(hand.jobs for hand in self._hands):
                self._hand_out(backlog, boards)
                ready = {id(item) for item in wait([hand.connection for hand in self._hands])}
                for hand in [each for each in self._hands if id(each.connection) in ready]:
                    yield from self._hear(hand, backlog, boards)
        finally:
            for hand in [each for each in self._hands if each.jobs]:
                self._hands.remove(hand)
                hand.dismiss()
            for board in boards.values():
                board.sheet.close_descriptor()

    def _hear(self, hand: Hand, backlog: deque[Job], boards: dict[int, Board]) -> Iterator[Answer]:
        """Take what a worker has to say, and see that all have work before it is passed on."""
        try:
            answer, learnt = hand.take()
        except (EOFError, OSError):
            yield from self._replace(hand, backlog)
            return
        self.memory.learn(learnt)
        self._hand_out(backlog, boards)
        yield answer

    def _hand_out(self, backlog: deque[Job], boards: dict[int, Board]) -> None:
        """Give every worker a task, and one ahead while there are plenty left."""
        for ahead in range(_AHEAD):
            for hand in self._hands:
                plenty = ahead == 0 or len(backlog) > len(self._hands)
                if backlog and plenty and len(hand.jobs) <= ahead:
                    job = backlog.popleft()
                    board = self._board(job.task.brief, boards)
                    try:
                        hand.give(job, board, self.memory.of(job.task))
                    except OSError:
                        continue  # it has died, which `_hear` will find out

    def _board(self, brief: Brief, boards: dict[int, Board]) -> Board:
        if id(brief) not in boards:
            boards[id(brief)] = post(self._boards, brief)
            self._boards += 1
        return boards[id(brief)]

    def _replace(self, hand: Hand, backlog: deque[Job]) -> Iterator[Answer]:
        """Fork a worker in the place of a dead one; its task is tried again, or its site lost."""
        self._hands.remove(hand)
        how, jobs = hand.dismiss(), list(hand.jobs)
        hand.jobs.clear()
        self._fill_up()
        for job in jobs[1:]:  # these it had not begun
            job.tries -= 1
        backlog.extendleft(reversed([job for job in jobs if job.tries < _TRIES]))
        for job in jobs:
            if job.tries >= _TRIES:
                reason = f"its worker died ({how}), {_TRIES} times over; is memory short?"
                yield SiteLost(job.task.site, reason, False, job.task.id)

    def _fill_up(self) -> None:
        wanted = min(self.workers or usable_cores(), max(1, len(self.holdings)))
        while len(self._hands) < wanted:
            self._hands.append(Hand(self._inline, self._hands))

    def _longest_first(self, tasks: Sequence[Task]) -> list[Task]:
        """Return tasks by how many rows they go over, the most first; scoring as it comes."""
        if not tasks or tasks[0].kind == "evaluate":
            return list(tasks)
        training, cost = self.plan.training, {}
        for task, rows in zip(
            tasks, count_rows(self.holdings, [task.site for task in tasks]), strict=True
        ):
            batch = min(training.batch_size or rows, rows)
            bounds = [training.steps * batch, training.epochs * rows]
            cost[task.id] = min((bound for bound in bounds if bound), default=0)
        return sorted(tasks, key=lambda task: cost[task.id], reverse=True)


def _dismiss(hands: list[Hand], owner: int) -> None:
    if os.getpid() == owner:  # a forked child has a copy of the list, and no right to it
        for hand in hands:
            hand.dismiss()
