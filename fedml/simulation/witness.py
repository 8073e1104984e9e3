"""What is seen of simulated sites while they work: beyond what a receipt may hold."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Brief, Report, Stack, Task, Update
from fedml.rounds import SiteLost
from fedml.simulation.executors.base import Answer, Executor


@dataclass(frozen=True)
class Seen:
    """One site's part in a round: its own numbers, bytes down and up, seconds of computing.

    `metrics` come with updates (such as `loss`), `scores` are means over its own held-out rows.
    Seconds are those of this machine between two answers; those of a stack are shared out evenly.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    down: int = 0
    up: int = 0
    seconds: float = 0.0


@dataclass
class Witness:
    """An executor that lets another one work, and notes what its sites answered."""

    executor: Executor
    _seen: dict[SiteId, Seen] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Yield what the executor yields, and note it."""
        sizes: dict[int, int] = {}  # by brief: a cohort shares a few at most
        down = {task.site: _memo(sizes, task.brief) for task in tasks}
        before = time.perf_counter()
        for answer in self.executor.run(tasks):
            self._seen.update(_notes(answer, down, time.perf_counter() - before))
            yield answer
            before = time.perf_counter()

    def take(self) -> Mapping[SiteId, Seen]:
        """Return what was seen since the last time, by site."""
        seen, self._seen = self._seen, {}
        return seen


def _memo(sizes: dict[int, int], brief: Brief) -> int:
    if id(brief) not in sizes:
        parts = (brief.params, *brief.slots.values())
        sizes[id(brief)] = sum(part.layout.bytes for part in parts)
    return sizes[id(brief)]


def _notes(
    answer: Answer, down: Mapping[SiteId, int], seconds: float
) -> Iterator[tuple[SiteId, Seen]]:
    match answer:
        case Stack():
            up = sum(part.layout.bytes for part in (answer.delta, *answer.slots.values()))
            each = seconds / max(len(answer), 1)
            for row, site in enumerate(answer.sites):
                metrics = {name: values[row] for name, values in answer.metrics.items()}
                yield site, Seen(metrics, {}, down.get(site, 0), up, each)
        case Update():
            up = sum(part.layout.bytes for part in (answer.delta, *answer.slots.values()))
            yield answer.site, Seen(answer.metrics, {}, down.get(answer.site, 0), up, seconds)
        case Report():
            rows = max(answer.count, 1.0)  # noised under privacy, it may vanish
            means = {name: total / rows for name, total in answer.totals.items()}
            yield answer.site, Seen({}, means, down.get(answer.site, 0), 0, seconds)
        case SiteLost():
            yield answer.site, Seen({}, {}, down.get(answer.site, 0), 0, seconds)
