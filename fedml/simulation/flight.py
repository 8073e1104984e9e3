"""What simulated sites work on when nobody waits for all of them, and what comes of it in order.

A task is done at the moment of virtual time at which its answer is due, so that one that was
cancelled before costs its site nothing. Answers that are due at one moment come in the order in
which their tasks were handed out, whichever executor does the work.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedml.params import Params
from fedml.protocol.messages import RunId, SiteId, TaskId
from fedml.protocol.tasks import Brief, Stack, Task
from fedml.rounds import SiteLost
from fedml.simulation.executors.base import Answer, CutTask, Executor

PLACE = "flight/"  # before the names of older briefs' parts, in a state file


@dataclass(frozen=True)
class Due:
    """A task whose answer comes at a moment of virtual time, or whose site is `lost` then."""

    task: Task
    at: float
    lost: str = ""


@dataclass
class Flight:
    """All tasks that were handed out and are not over, in that order."""

    dues: dict[TaskId, Due] = field(default_factory=dict)

    def carried(self, tasks: Mapping[str, str]) -> tuple[Due, ...]:
        """Return those of a receipt's `carried`, in the order in which they were handed out."""
        wanted = {*tasks.values()}
        return tuple(due for task, due in self.dues.items() if task in wanted)

    def land(self, dues: Iterable[Due], executor: Executor) -> Iterator[Answer]:
        """Do what is due at one moment, and yield what comes of it in the order of `dues`.

        What is over by now is left out.
        """
        there = [due for due in dues if due.task.id in self.dues]
        places = {due.task.id: place for place, due in enumerate(there)}
        answers: list[Answer] = [
            SiteLost(due.task.site, due.lost, task=due.task.id) for due in there if due.lost
        ]
        for tasks in _batches([due.task for due in there if not due.lost]):
            answers += executor.run(tasks)
        yield from _in_order(answers, places)


def _batches(tasks: Sequence[Task]) -> Iterator[list[Task]]:
    """Yield the tasks that share a brief, for these are done at once."""
    batches: dict[tuple[int, str], list[Task]] = {}
    for task in tasks:
        batches.setdefault((task.round, task.kind), []).append(task)
    yield from batches.values()


def _in_order(answers: Sequence[Answer], places: Mapping[TaskId, int]) -> Iterator[Answer]:
    """Yield answers by the places of their tasks; a stack is parted where others come between."""
    rows = sorted(
        (places[task], number, row)
        for number, answer in enumerate(answers)
        for row, task in enumerate(_tasks(answer))
    )
    for number, some in itertools.groupby(rows, key=lambda found: found[1]):
        answer = answers[number]
        yield answer.take([row for _, _, row in some]) if isinstance(answer, Stack) else answer


def _tasks(answer: Answer) -> Sequence[TaskId]:
    if isinstance(answer, Stack):
        return answer.tasks
    assert answer.task is not None, "an executor speaks of the tasks that it was given"
    return (answer.task,)


# --- in a checkpoint: each older round's brief once, and who works on it --------------------------


def described(dues: Sequence[Due]) -> tuple[dict[str, Params], dict[str, Any]]:
    """Return parts of a state file, and of the record that names it: none if none is in flight."""
    if not dues:
        return {}, {}
    parts: dict[str, Params] = {}
    rules: dict[str, Any] = {}
    for number, brief in {due.task.round: due.task.brief for due in dues}.items():
        parts[f"{PLACE}{number}/"] = brief.params
        parts.update({f"{PLACE}{number}/{name}": slot for name, slot in brief.slots.items()})
        rules[str(number)] = [brief.rule, dict(brief.settings), [*brief.slots]]
    return parts, {"briefs": rules, "flight": [_record(due) for due in dues]}


def _record(due: Due) -> list[object]:
    task = due.task
    work = task.work if isinstance(task, CutTask) else 1.0
    return [task.id, task.run, task.round, task.site, work, due.at, due.lost]


def read(record: Mapping[str, Any], parts: Mapping[str, Params]) -> tuple[Due, ...]:
    """Return what `described` wrote; nothing where a checkpoint says nothing of it."""
    briefs = {
        number: Brief(
            parts[f"{PLACE}{number}/"],
            rule,
            settings,
            {name: parts[f"{PLACE}{number}/{name}"] for name in slots},
        )
        for number, (rule, settings, slots) in record.get("briefs", {}).items()
    }
    dues = []
    for id, run, number, site, work, at, lost in record.get("flight", ()):
        brief = briefs[str(number)]
        task = Task(TaskId(id), RunId(run), int(number), SiteId(site), "train", brief)
        dues.append(Due(task if work == 1 else cut(task, work), at, lost))
    return tuple(dues)


def cut(task: Task, work: float) -> CutTask:
    """Return `task` for a site that has time for a part of its steps."""
    return CutTask(task.id, task.run, task.round, task.site, task.kind, task.brief, work)
