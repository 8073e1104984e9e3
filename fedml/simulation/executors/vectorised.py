"""All sites of a cohort as one batched computation: for small models, and for a GPU.

Sites go by memory-bounded chunks; each chunk's updates leave as one `Stack`. What cannot be
batched (batch normalisation, a rule that is not elementwise, an operation that torch cannot
batch) is done by `Inline`, and the log says why.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from fedml.errors import ConfigError, FedmlError
from fedml.learning.cohort import CohortTrainer, Trained
from fedml.learning.evaluation import evaluate_all
from fedml.learning.gradients import Precision
from fedml.learning.private_cohort import Release, train_privately
from fedml.learning.recipe import Recipe, Rows
from fedml.learning.rowstack import RowStack
from fedml.learning.trainer import check_share, diverged, on_device, path_of, seeded
from fedml.privacy.accounting import Event, evaluation_event, own_share, training_event, unit_of
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Brief, Stack, Task
from fedml.rounds import Plan, SiteLost
from fedml.simulation.executors.base import (
    Answer,
    CutTask,
    Holding,
    Memory,
    count_rows,
    stack_rows,
)
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.machine import tune_allocator
from fedml.stacked import Stacked
from fedml.strategies import RULES, is_personal, not_at_once

_CPU_BYTES = 2**30  # for one chunk, unless `bytes` says otherwise
_GPU_SHARE = 0.6  # of what is free
_ROWS_AT_ONCE = 2**16  # scored together
_NOTHING: frozenset[str] = frozenset()
_SMALL = 2**24  # multiplications of a step below which threads cost more than they bring
_UNBATCHED = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)


@dataclass
class Vectorised:
    """Trains whole cohorts at once on `device`, within about `bytes` of memory (0: chosen).

    Raises `ConfigError` at birth for a device that is not here. `precision` bf16 computes in
    bfloat16 where torch thinks it safe; parameters and sums stay as they are.
    """

    plan: Plan
    recipe: Recipe
    holdings: Mapping[SiteId, Holding]
    memory: Memory = field(default_factory=Memory)
    device: str = "cpu"
    bytes: int = 0
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigError(f"executor.device {self.device}: no GPU here; use device=cpu")
        if self.precision not in ("fp32", "bf16"):
            raise ConfigError(f"executor.precision {self.precision!r}: use fp32 or bf16")
        if self.bytes < 0:
            raise ConfigError(f"executor.bytes {self.bytes}: give a number of bytes, or 0")
        if self.device != "cpu":
            tune_allocator()  # or each round's rows and means are pages new to this process
        self._inline = Inline(self.plan, self.recipe, self.holdings, self.memory, self.device)
        self._said: set[str] = set()

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Yield a `Stack` a chunk, and a `SiteLost` or an answer of its own for each other site."""
        with _threads(self._is_small):
            for batched, some in self._sorted(tasks):
                if not batched:
                    yield from self._inline.run(some)
                elif some[0].kind == "evaluate":
                    yield from self._score(some)
                elif isinstance(trainer := self._trainer, CohortTrainer):
                    for chunk in self._chunks(trainer, some):
                        yield from self._train(trainer, chunk)

    def why_not(self, brief: Brief) -> str:
        """Return why training on `brief` cannot be batched, or ""."""
        if unit_of(self.plan.privacy.mode) == "site":
            return "each site's update is bounded by itself"
        if reason := not_at_once(brief):
            return reason
        return self._trainer if isinstance(self._trainer, str) else ""

    @cached_property
    def _trainer(self) -> CohortTrainer | str:
        plan = self.plan
        try:
            device = torch.device(self.device)
            by_rows = plan.privacy.mode != "none"
            return CohortTrainer(
                self.recipe, plan.training, device, self.precision, by_rows=by_rows
            )
        except (ConfigError, *_UNBATCHED) as error:
            return f"the model cannot be batched: {error}"

    @property
    def _is_small(self) -> bool:
        if isinstance(self._trainer, str) or self.device != "cpu":
            return False
        rows = self.plan.training.batch_size or 32
        size = self._trainer.layout.sizes[self._trainer.dtype]
        return rows * size * (self.plan.cohort.size or len(self.holdings)) < _SMALL

    def _sorted(self, tasks: Sequence[Task]) -> Iterator[tuple[bool, list[Task]]]:
        """Yield lists of tasks that share a brief and what their sites remember."""
        alike: dict[tuple[object, ...], list[Task]] = {}
        slots = self.memory.slots
        for task in tasks:
            kept = frozenset(slots[task.site]) if task.site in slots else _NOTHING
            cut = isinstance(task, CutTask)
            alike.setdefault((id(task.brief), task.kind, kept, cut), []).append(task)
        for some in alike.values():
            reason = self.why_not(some[0].brief) if some[0].kind == "train" else ""
            if some[0].kind == "evaluate" and is_personal(some[0].brief):
                reason = f"rule {some[0].brief.rule} scores each site's own model"
            if isinstance(some[0], CutTask):
                reason = "some sites have time for a part of their steps alone"
            if self.plan.privacy.mode == "patient":
                reason = "privacy mode patient takes rows person by person"
            if reason:
                self._say(reason)
            yield not reason, some

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            print(f"executor: site by site, for {reason}", file=sys.stderr, flush=True)

    # training

    def _chunks(self, trainer: CohortTrainer, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        """Yield sites, most rows first, as many as fit into memory, with batches of like size."""
        counts = count_rows(self.holdings, [task.site for task in tasks])
        order = sorted(range(len(tasks)), key=lambda place: -counts[place])
        budget, batch = self._budget(), self.plan.training.batch_size
        while order:
            most = counts[order[0]]
            width = min(most, batch or most)
            room = max(1, budget // trainer.site_bytes(most))
            chunk = order[:room]
            if min(counts[chunk[-1]], width) * 2 < width:
                chunk = [place for place in chunk if counts[place] * 2 >= width]
            yield [tasks[place] for place in chunk]
            order = order[len(chunk) :]

    def _budget(self) -> int:
        if self.bytes:
            return self.bytes
        if self.device == "cpu":
            return _CPU_BYTES
        return int(_GPU_SHARE * torch.cuda.mem_get_info(self.device)[0])

    def _train(self, trainer: CohortTrainer, tasks: Sequence[Task]) -> Iterator[Answer]:
        try:
            answers = self._trained(trainer, tasks)
        except torch.OutOfMemoryError:
            half = len(tasks) // 2
            if half == 0:
                yield from self._inline.run(tasks)
                return
            for some in (tasks[:half], tasks[half:]):
                yield from self._train(trainer, some)
        except (FedmlError, *_UNBATCHED) as error:  # Inline says it again, site by site, or copes
            self._say(str(error).partition("\n")[0])
            yield from self._inline.run(tasks)
        else:
            yield from answers

    def _trained(self, trainer: CohortTrainer, tasks: Sequence[Task]) -> list[Answer]:
        sites = [task.site for task in tasks]
        rows = stack_rows(self.holdings, sites).to(trainer.device)
        if min(rows.counts) == 0:
            raise ConfigError("some sites have no rows")
        brief = on_device(tasks[0].brief, trainer.device)
        slots = self.memory.slots  # all of these sites remember slots of the same names
        memory = {
            name: Stacked([slots[site][name] for site in sites]).to(trainer.device)
            for name in slots.get(sites[0], {})
        }
        seed = self.plan.task_seed
        with seeded(seed(tasks[0].round, sites[0]), trainer.device):
            if self.plan.privacy.in_training:
                return self._private(trainer, tasks, brief, memory, rows)
            shuffled = trainer.shuffles(rows.counts)
            seeds = [seed(task.round, task.site) for task in tasks] if shuffled else []
            trained = trainer.train(brief, memory, rows, seeds)
        metrics = {"loss": trained.mean_losses()}
        weights = [float(count) for count in rows.counts]
        return self._answers(tasks, brief, memory, trained, _Told(weights, metrics))

    def _private(
        self,
        trainer: CohortTrainer,
        tasks: Sequence[Task],
        brief: Brief,
        memory: Mapping[str, Stacked],
        rows: RowStack,
    ) -> list[Answer]:
        training, privacy = self.plan.training, self.plan.privacy
        check_share(privacy, brief)
        events = [training_event(training, privacy, count) for count in rows.counts]
        releases = [
            Release(own_share(event, privacy), n)
            for event, n in zip(events, rows.counts, strict=True)
        ]
        trained = train_privately(trainer, brief, memory, rows, releases, privacy.clip)
        metrics = {
            "steps": [float(event.steps) for event in events],
            "noise_multiplier": [event.noise for event in events],
        }
        weights = [float(count) for count in rows.counts]
        return self._answers(tasks, brief, memory, trained, _Told(weights, metrics, events))

    def _answers(
        self,
        tasks: Sequence[Task],
        brief: Brief,
        memory: Mapping[str, Stacked],
        trained: Trained,
        told: _Told,
    ) -> list[Answer]:
        lost = trained.diverged()
        answers: list[Answer] = [
            SiteLost(tasks[row].site, str(diverged(step, trained.steps[row])), False, tasks[row].id)
            for row, step in lost.items()
        ]
        sound = [row for row in range(len(tasks)) if row not in lost]
        if not sound:
            return answers
        ours = [tasks[row] for row in sound]
        delta = trained.delta.take(sound) if lost else trained.delta
        slots = {}
        if brief.rule != "plain":
            paths = [path_of(self.plan.training, trained.steps[row]) for row in sound]
            kept = {name: slot.take(sound) for name, slot in memory.items()}
            slots = self._finish(ours, brief, kept, delta, paths)
            delta = slots.pop("delta", delta)
        epsilons = []
        if told.events:
            spend, share = self.memory.spend, self.plan.privacy.delta
            epsilons = [spend(tasks[row], told.events[row], share) for row in sound]
        stack = Stack(
            ours[0].round,
            tuple([task.site for task in ours]),
            tuple([task.id for task in ours]),
            delta,
            tuple([told.weights[row] for row in sound]),
            slots,
            {name: [values[row] for row in sound] for name, values in told.metrics.items()},
            epsilons,
        )
        return [*answers, stack]

    def _finish(
        self,
        tasks: Sequence[Task],
        brief: Brief,
        memory: Mapping[str, Stacked],
        delta: Stacked,
        paths: Sequence[Mapping[str, float]],
    ) -> dict[str, Stacked]:
        """Let the rule report and remember, site by site; return the stacked reports."""
        rule, reports = RULES[brief.rule], []
        for row, task in enumerate(tasks):
            own = {name: slot.row(row) for name, slot in memory.items()}
            report, kept = rule.finish(brief, own, delta.row(row), paths[row])
            reports.append(report)
            self.memory.slots[task.site] = {name: slot.to("cpu") for name, slot in kept.items()}
        return {name: Stacked([report[name] for report in reports]) for name in reports[0]}

    # scoring

    def _score(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        some: list[Task] = []
        rows: list[Rows] = []
        for task in tasks:
            some.append(task)
            rows.append(self.holdings[task.site].held_out)
            if sum(map(len, rows)) >= _ROWS_AT_ONCE:
                yield from self._scored(some, rows)
                some, rows = [], []
        if some:
            yield from self._scored(some, rows)

    def _scored(self, tasks: Sequence[Task], rows: Sequence[Rows]) -> Iterator[Answer]:
        privacy = self.plan.privacy
        try:
            reports = evaluate_all(self.recipe, tasks, rows, privacy, self.device)
        except FedmlError:  # one site's rows, maybe: Inline finds out whose
            yield from self._inline.run(tasks)
            return
        for task, report in zip(tasks, reports, strict=True):
            if privacy.mode == "none":
                yield report
            else:
                spent = self.memory.spend(task, evaluation_event(privacy), privacy.delta)
                yield replace(report, epsilon=spent)


@dataclass(frozen=True)
class _Told:
    """What goes with the deltas, a value a site; `events` are what privacy charges."""

    weights: Sequence[float]
    metrics: Mapping[str, Sequence[float]]
    events: Sequence[Event] = ()


@contextmanager
def _threads(single: bool) -> Iterator[None]:
    """Work on one thread within, if `single`: small products only wait for each other."""
    before = torch.get_num_threads()
    if single:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if single:
            torch.set_num_threads(before)
