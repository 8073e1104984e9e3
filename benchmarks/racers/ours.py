"""fedml as `fedml simulate` runs it: `Run`, `Round`, `Engine` and an executor."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.race import Gate
from benchmarks.workloads import WORKLOADS, Workload, accuracy
from fedml.learning.recipe import Recipe, Rows, identify, load
from fedml.params import Params
from fedml.protocol.messages import RunId, SiteId, Training
from fedml.rounds import Commit, Plan, Run
from fedml.rounds.plan import Cohort, Evaluation
from fedml.simulation.crowd import Users
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.base import Executor, Holding, Memory
from fedml.strategies import FedAvg

_FILE = Path(__file__).parents[1] / "recipes" / "workload.py"
_RECIPES = {"w1": f"{_FILE}:ImageModel", "w2": f"{_FILE}:SmallModel"}
_ROUNDS = 10_000  # more than anyone waits for


def main() -> None:
    """Race until told to stop."""
    address, name, workers, precision = sys.argv[1:]
    gate, workload = Gate(address), WORKLOADS[name]
    plan, recipe = plan_of(workload), load(identify(name, _RECIPES), _RECIPES)
    holdings = holdings_of(workload)
    executor = _executor(name, plan, recipe, holdings, int(workers), precision)
    torch.manual_seed(0)
    run = Run.begin(RunId("race"), plan, Params(recipe.build().state_dict()))

    def watch(commit: Commit) -> None:
        gate.tell(0.0)
        state = commit.state
        assert state is not None
        while (asked := gate.wait()) == "score":
            model = recipe.build()
            model.load_state_dict(state.params)
            gate.tell(accuracy(model, workload))
        if asked == "stop":
            raise SystemExit

    gate.wait()
    Engine(run, executor, statuses(plan, holdings), watch=watch).play()


def plan_of(workload: Workload) -> Plan:
    """Return the workload as a plan."""
    return Plan(
        model=workload.name,
        recipe=identify(workload.name, _RECIPES),
        dataset=workload.name,
        strategy=FedAvg(),
        training=Training(lr=workload.lr, epochs=1, batch_size=workload.batch),
        cohort=Cohort(quorum=workload.cohort, size=workload.cohort, deadline=60.0),
        rounds=_ROUNDS,
        evaluation=Evaluation(at_end=False),
    )


@dataclass(frozen=True)
class _Dealt:
    """Rows that every user has from the start, [users, samples, ...]."""

    x: Tensor
    y: Tensor

    def rows(self, users: NDArray[np.uint64], first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return `count` rows of each user."""
        of = torch.from_numpy(users.astype(np.int64))
        return self.x[of, first : first + count], self.y[of, first : first + count]


def holdings_of(workload: Workload) -> Mapping[SiteId, Holding]:
    """Return the workload's users as sites: many small ones as a crowd."""
    x, y = workload.data()
    if workload.name == "w2":
        return Users(_Dealt(x, y), workload.users, workload.samples)
    nobody = Rows(x[0, :0], y[0, :0])
    return {
        SiteId(f"site-{user:05d}"): Holding(Rows(x[user], y[user]), nobody)
        for user in range(workload.users)
    }


def _executor(
    name: str,
    plan: Plan,
    recipe: Recipe,
    holdings: Mapping[SiteId, Holding],
    workers: int,
    precision: str,
) -> Executor:
    assert precision in ("fp32", "bf16")
    if name == "w2":
        from fedml.simulation.executors.vectorised import Vectorised

        made: Executor = Vectorised(plan, recipe, holdings, Memory())
        return made
    from fedml.simulation.executors.processes import Processes

    return Processes(
        plan, recipe, holdings, Memory(), workers, "bf16" if precision == "bf16" else "fp32"
    )


if __name__ == "__main__":
    main()
