"""W1 on one device: the cohort of 50 as one computation, beside a loop over its sites."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.learning.recipe import Rows
from fedml.params import Params
from fedml.protocol.messages import RecipeId, RunId, Training
from fedml.rounds import Cohort, Commit, Evaluation, Plan, Run
from fedml.simulation.crowd import Users
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import FedAvg

USERS, COHORT, ROWS, BATCH, LR = 1000, 50, 50, 10, 0.1


class Images:
    """The recipe: two convolutions and two linear layers, 1,626,442 parameters."""

    labels = tuple(map(str, range(10)))

    def build(self) -> nn.Module:
        """Return the network of the benchmark's definition."""
        return nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Dropout(0.25), nn.Flatten(), nn.Linear(12544, 128), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(128, 10),
        )  # fmt: skip

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Refuse: rows are made."""
        raise NotImplementedError(f"{path}: this recipe reads no files")

    def example(self, rows: int) -> Tensor:
        """Return zeros."""
        return torch.zeros(rows, 3, 32, 32)


@dataclass(frozen=True)
class Noise:
    """Synthetic images, other ones for each user: a slice of one normal stream."""

    stream: Tensor

    def rows(self, users: npt.NDArray[np.uint64], first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return [users, count, 3, 32, 32] and labels that one pixel's sign and size decide."""
        size, own = 3 * 32 * 32, []
        for user in users.tolist():
            start = (user * 7919 + first) % (len(self.stream) - count * size)
            own.append(self.stream[start : start + count * size].view(count, 3, 32, 32))
        x = torch.stack(own)
        return x, (x[:, :, 0, 0, 0] * 5).long().abs() % 10


def measure(device: str, rounds: int) -> tuple[float, float]:
    """Return the least seconds of a round: of the loop over sites, and of `Vectorised`."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randn(10 * ROWS * 3 * 32 * 32, generator=generator)
    holdings = Users(Noise(stream), USERS, ROWS)
    return _loop(holdings, device, rounds), _at_once(holdings, device, rounds)


def _at_once(holdings: Users, device: str, rounds: int) -> float:
    recipe, ends = Images(), list[float]()
    plan = Plan(
        model="images",
        recipe=RecipeId("images", "0" * 64),
        dataset="made",
        strategy=FedAvg(),
        training=Training(lr=LR, epochs=1, batch_size=BATCH),
        cohort=Cohort(quorum=COHORT, deadline=60.0, size=COHORT),
        rounds=rounds + 1,
        evaluation=Evaluation(at_end=False),
    )

    def watch(commit: Commit) -> None:
        ends.append(time.perf_counter())

    torch.manual_seed(0)
    run = Run.begin(RunId("w1"), plan, Params(recipe.build().state_dict()))
    executor = Vectorised(plan, recipe, holdings, device=device)
    outcome = Engine(run, executor, statuses(plan, holdings), watch=watch).play()
    assert outcome.end.state == "done", outcome.end
    return float(np.diff(ends).min())


def _loop(holdings: Users, device: str, rounds: int) -> float:
    """Train site after site and average: nothing else, all on the device."""
    torch.manual_seed(0)
    model = Images().build().to(device).train()
    start = [p.detach().clone() for p in model.parameters()]
    least = float("inf")
    for number in range(rounds + 1):
        begun = time.perf_counter()
        total = [torch.zeros_like(p) for p in start]
        for user in range(COHORT):
            rows = holdings.stack([holdings.name((number * COHORT + user) % USERS)])
            x, y = rows.x[0].to(device), rows.y[0].to(device)
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), start, strict=True):
                    parameter.copy_(value)
            optimiser = torch.optim.SGD(model.parameters(), lr=LR)
            for part in torch.randperm(ROWS, device=device).split(BATCH):
                optimiser.zero_grad()
                torch.autograd.backward([functional.cross_entropy(model(x[part]), y[part])])
                optimiser.step()
            for each, parameter in zip(total, model.parameters(), strict=True):
                each += parameter.detach()
        start = [each / COHORT for each in total]
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if number:  # the first warms up
            least = min(least, time.perf_counter() - begun)
    return least
