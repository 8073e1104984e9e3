"""The reference executor: site after site, in this process, by the production trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedml.errors import ConfigError, FedmlError, Refused
from fedml.learning.evaluation import evaluate
from fedml.learning.gradients import Precision
from fedml.learning.persons import check_apart, groups_of
from fedml.learning.recipe import Recipe
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.privacy.accounting import evaluation_event, training_event
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Report, Task, Update
from fedml.rounds import Plan, SiteLost
from fedml.simulation.executors.base import (
    Answer,
    Holding,
    Memory,
    check_device,
    training_of,
)


@dataclass
class Inline:
    """Works through tasks one by one, on one device.

    Under privacy it adds up each site's epsilon as the site's ledger would; the number of rows,
    or of patients, counts as public. `copy` is the trainer's.
    """

    plan: Plan
    recipe: Recipe
    holdings: Mapping[SiteId, Holding]
    memory: Memory = field(default_factory=Memory)
    device: str = "cpu"
    precision: Precision = "fp32"
    copy: Callable[[Params], Params] = Params.clone

    def __post_init__(self) -> None:
        check_device(self.device)
        plan = self.plan
        self._trainer = Trainer(
            self.recipe, plan.training, plan.privacy, self.device, self.precision, self.copy
        )

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Yield answers in the order of `tasks`."""
        for task in tasks:
            try:
                yield self._train(task) if task.kind == "train" else self._score(task)
            except FedmlError as error:
                final = isinstance(error, ConfigError | Refused)
                yield SiteLost(task.site, str(error), final, task.id)

    def _train(self, task: Task) -> Update:
        plan, site, rows = self.plan, task.site, self.holdings[task.site].train
        public = self._units(self.holdings[site])
        training = training_of(task, plan.training, len(rows))
        whole = training is plan.training
        trainer = self._trainer if whole else replace(self._trainer, training=training)
        update, self.memory.slots[site] = trainer.train(
            task,
            rows,
            self.memory.slots.get(site, {}),
            seed=plan.task_seed(task.round, site),
            public_rows=public,
        )
        if plan.privacy.mode == "none":
            return update
        event = training_event(plan.training, plan.privacy, public)
        return replace(update, epsilon=self.memory.spend(task, event, plan.privacy.delta))

    def _units(self, holding: Holding) -> int:
        """Return the number of rows to train on, or of persons where privacy is about them."""
        if self.plan.privacy.mode != "patient":
            return len(holding.train)
        if len(holding.held_out):
            check_apart(holding.train, holding.held_out)
        return len(groups_of(holding.train).unique())

    def _score(self, task: Task) -> Report:
        privacy = self.plan.privacy
        rows = self.holdings[task.site].held_out
        memory = self.memory.slots.get(task.site, {})
        report = evaluate(self.recipe, task, rows, privacy, self.device, memory)
        if privacy.mode == "none":
            return report
        event = evaluation_event(privacy)
        return replace(report, epsilon=self.memory.spend(task, event, privacy.delta))
