"""The executor that suits the work and the machine, chosen by estimates and explained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedml.errors import ConfigError, Refused
from fedml.learning.gradients import Precision
from fedml.learning.recipe import Recipe
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Task
from fedml.rounds import Plan
from fedml.simulation.executors.base import Answer, Executor, Holding, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.machine import usable_cores
from fedml.simulation.executors.processes import Processes

_SMALL = 5e7  # operations of a step below which calling torch costs more than computing
_ROWS = 32  # of a step, where the plan does not say


@dataclass
class Auto:
    """Chooses an executor at birth, and prints in one line which and why.

    What it looks at is counted, not timed, so the same machine makes the same choice again:
    operations of a step, sites of a round, cores, GPU, and whether sites can be stacked at all.
    """

    plan: Plan
    recipe: Recipe
    holdings: Mapping[SiteId, Holding]
    memory: Memory = field(default_factory=Memory)
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        self.chosen, self.reason = self._choose()
        print(f"executor: {type(self.chosen).__name__.lower()}, for {self.reason}", flush=True)

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Yield what the chosen executor answers."""
        return self.chosen.run(tasks)

    def _choose(self) -> tuple[Executor, str]:
        sites, cores = self.plan.cohort.size or len(self.holdings), usable_cores()
        work = self._operations()
        step = f"a step is {work / 1e6:.3g} million operations"
        gpu = torch.cuda.is_available()
        why_not = "its step is big enough for a core"
        if sites > 1 and (gpu or work < _SMALL):
            stacked, why_not = self._stacked("cuda" if gpu else "cpu")
            if stacked is not None:
                where = "on the GPU" if gpu else "at once"
                return stacked, f"{step}, and {sites} sites a round can be trained {where}"
        everything = (self.plan, self.recipe, self.holdings, self.memory)
        if sites > 1 and cores > 1:
            spread = Processes(*everything, precision=self.precision)
            return spread, f"{step}, {sites} sites a round keep {cores} cores busy ({why_not})"
        few = f"{sites} site a round" if sites == 1 else "one core"
        return Inline(*everything, precision=self.precision), f"there is only {few}"

    def _stacked(self, device: str) -> tuple[Executor | None, str]:
        """Return the vectorised executor, or None and why this work cannot be stacked."""
        try:
            from fedml.simulation.executors.vectorised import Vectorised

            made: Executor = Vectorised(
                self.plan, self.recipe, self.holdings, self.memory, device, precision=self.precision
            )
        except (ConfigError, Refused, ImportError) as error:
            return None, str(error)
        return made, ""

    def _operations(self) -> float:
        """Return the floating point operations of one step: forward, and twice that back."""
        rows = self.plan.training.batch_size or _ROWS
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model = self.recipe.build().eval()
            with FlopCounterMode(display=False) as counter:
                model(self.recipe.example(rows))
        return 3.0 * float(counter.get_total_flops())
