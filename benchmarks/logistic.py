"""W2: logistic regression 30 to 2 at a crowd, 200 users a round, one batch of 20 rows each.

`python -m benchmarks.logistic USERS ROUNDS` plays it in a fresh process and prints one JSON line.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.learning.recipe import Rows
from fedml.params import Params
from fedml.protocol.messages import RecipeId, RunId, Training
from fedml.rounds import Cohort, Commit, Evaluation, Plan, Run
from fedml.simulation.crowd import Made, Users
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import FedAvg

COHORT, BATCH, FEATURES, LABELS, LR = 200, 20, 30, 2, 0.1


class Logistic:
    """The recipe: one linear layer that starts at zero."""

    labels = ("no", "yes")

    def build(self) -> nn.Module:
        """Return the layer."""
        linear = nn.Linear(FEATURES, LABELS)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(linear)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Refuse: a crowd's rows are made."""
        raise NotImplementedError(f"{path}: this recipe reads no files")

    def example(self, rows: int) -> Tensor:
        """Return zeros."""
        return torch.zeros(rows, FEATURES)


@dataclass(frozen=True)
class Timing:
    """Seconds of each round after the first, seconds to the end of the first, peak memory."""

    rounds: tuple[float, ...]
    start: float
    peak: int  # bytes, of the whole process
    loss: float  # of the last round


def crowd(users: int) -> Users:
    """Return the population."""
    return Users(Made(FEATURES), users, BATCH)


def play(users: int, rounds: int) -> Timing:
    """Play whole rounds of `Engine`, `Run` and FedAvg, receipts and all."""
    begun = time.perf_counter()
    recipe, holdings = Logistic(), crowd(users)
    plan = Plan(
        model="logistic",
        recipe=RecipeId("logistic", "0" * 64),
        dataset="made",
        strategy=FedAvg(),
        training=Training(lr=LR, epochs=1, batch_size=BATCH),
        cohort=Cohort(quorum=1, deadline=60.0, size=COHORT),
        rounds=rounds + 1,
        evaluation=Evaluation(at_end=False),
    )
    ends: list[float] = []
    losses: list[float] = []

    def watch(commit: Commit) -> None:
        assert len(commit.receipt.counted) == COHORT, commit.receipt.missing
        ends.append(time.perf_counter())
        losses.append(commit.receipt.metrics["loss"])

    run = Run.begin(RunId("w2"), plan, Params(recipe.build().state_dict()))
    executor = Vectorised(plan, recipe, holdings)
    outcome = Engine(run, executor, statuses(plan, holdings), watch=watch).play()
    assert outcome.end.state == "done", outcome.end
    periods = tuple(float(period) for period in np.diff(ends))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Timing(periods, ends[0] - begun, peak, losses[-1])


def stacked_loop(users: int, rounds: int) -> tuple[float, ...]:
    """Return the seconds of each round of the bare work: rows, two products, softmax, mean."""
    holdings, weights = crowd(users), torch.zeros(LABELS, FEATURES)
    bias, generator = torch.zeros(LABELS), np.random.default_rng(0)
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        names = [holdings.name(int(k)) for k in generator.integers(users, size=COHORT)]
        rows = holdings.stack(names)
        own, offset = weights.expand(COHORT, -1, -1), bias.expand(COHORT, 1, -1)
        chances = torch.baddbmm(offset, rows.x, own.mT).softmax(2)
        wrong = (chances - functional.one_hot(rows.y, LABELS)) / BATCH
        moved = own - LR * torch.bmm(wrong.mT, rows.x)
        weights, bias = moved.mean(0), bias - LR * wrong.sum(1).mean(0)
        seconds.append(time.perf_counter() - begun)
    return tuple(seconds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    timing = play(int(sys.argv[1]), int(sys.argv[2]))
    print(json.dumps(timing.__dict__))
