"""The reference executor: site after site, in this process, by the production trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedml.errors import ConfigError, FedmlError, Refused
from fedml.learning.evaluation import evaluate
from fedml.learning.recipe import Recipe
from fedml.learning.trainer import Trainer
from fedml.privacy.accounting import Event, epsilon, evaluation_event, training_event
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Report, Task, Update
from fedml.rounds import Plan, SiteLost
from fedml.simulation.executors.base import Answer, Holding, Memory, training_of


@dataclass
class Inline:
    """Works through tasks one by one, on one device.

    Under record privacy it adds up each site's epsilon as the site's ledger would; the number of
    rows counts as public.
    """

    plan: Plan
    recipe: Recipe
    holdings: Mapping[SiteId, Holding]
    memory: Memory = field(default_factory=Memory)
    device: str = "cpu"

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
        training = training_of(task, plan.training, len(rows))
        trainer = Trainer(self.recipe, training, plan.privacy, self.device)
        update, self.memory.slots[site] = trainer.train(
            task,
            rows,
            self.memory.slots.get(site, {}),
            seed=plan.task_seed(task.round, site),
            public_rows=len(rows),
        )
        if plan.privacy.mode == "none":
            return update
        event = training_event(plan.training, plan.privacy, len(rows))
        return replace(update, epsilon=self._spend(task, event))

    def _score(self, task: Task) -> Report:
        privacy = self.plan.privacy
        rows = self.holdings[task.site].held_out
        report = evaluate(self.recipe, task, rows, privacy, self.device)
        if privacy.mode == "none":
            return report
        return replace(report, epsilon=self._spend(task, evaluation_event(privacy)))

    def _spend(self, task: Task, event: Event) -> float:
        place = (task.site, task.kind)
        releases = self.memory.releases.get(place, 0) + 1
        self.memory.releases[place] = releases
        return epsilon([event] * releases, self.plan.privacy.delta)
