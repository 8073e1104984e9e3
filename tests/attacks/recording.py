"""What sites of a simulated run release, one by one, whichever engine trains them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedml.learning.recipe import Recipe
from fedml.params import Params
from fedml.protocol.messages import Privacy, RecipeId, RunId, SiteId, Training
from fedml.protocol.tasks import Stack, Task, Update
from fedml.rounds import Cohort, Evaluation, Plan, Run, SiteLost
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.base import Answer, Executor, Holding, MakeExecutor, Memory
from fedml.strategies import FedAvg


@dataclass
class Recorder:
    """An executor that lets another one work and keeps all that sites release."""

    executor: Executor
    released: list[Update] = field(default_factory=list)

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        for answer in self.executor.run(tasks):
            assert not isinstance(answer, SiteLost), answer.reason
            if isinstance(answer, Stack):
                self.released += [answer.update(row) for row in range(len(answer))]
            elif isinstance(answer, Update):
                self.released.append(answer)
            yield answer


def released(
    make: MakeExecutor,
    recipe: Recipe,
    holdings: Mapping[SiteId, Holding],
    training: Training,
    privacy: Privacy,
) -> list[Update]:
    """Return what all sites of a run release, round after round."""
    plan = Plan(
        model="recorded",
        recipe=RecipeId("recorded", "0" * 64),
        dataset="recorded",
        strategy=FedAvg(),
        training=training,
        cohort=Cohort(quorum=len(holdings), deadline=60.0),
        rounds=privacy.rounds,
        privacy=privacy,
        evaluation=Evaluation(at_end=False),
    )
    recorder = Recorder(make(plan, recipe, holdings, Memory()))
    run = Run.begin(RunId("r"), plan, Params(recipe.build().state_dict()))
    outcome = Engine(run, recorder, statuses(plan, holdings)).play()
    assert outcome.end.state == "done", outcome.end
    return recorder.released
