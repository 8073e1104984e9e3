"""Recipes and sites of uneven size, for tests of executors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.learning.recipe import Rows
from fedml.params import Params
from fedml.protocol.messages import RecipeId, SiteId, Training
from fedml.rounds import Evaluation, Plan
from fedml.simulation.executors.base import Holding
from fedml.strategies import FedAvg, Forest, Strategy
from fedml.strategies.kmeans import Centroids
from tests.simulation.worlds import cohort


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = functional.cross_entropy(output, target)
    return loss


def weighted(output: Tensor, target: Tensor) -> Tensor:
    """A loss that is no mean of rows."""
    loss: Tensor = functional.cross_entropy(output, target, weight=torch.tensor([1.0, 3.0, 0.5]))
    return loss


class Shift(nn.Module):
    """A trainable shift and a frozen factor, in a module of its own kind."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(size))
        self.factor = nn.Parameter(torch.full((size,), 1.5), requires_grad=False)
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


def line() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 3))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 7), nn.Tanh(), Shift(7), nn.Linear(7, 3, bias=False))


def forest() -> nn.Module:
    return Forest(8, outputs=3, trees=2, depth=2, bins=16)


def clusters() -> nn.Module:
    return Centroids(3, 8, spread=1.0)


def nearest(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * output.min(1).values.mean()


def half_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    return model


def network() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 4, 2, padding=1), nn.ReLU(),
        nn.MaxPool2d(2, stride=1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def recurrent() -> nn.Module:
    """What torch.func cannot batch."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.out = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.out(self.lstm(x.reshape(len(x), 4, 2))[0][:, -1])
            return output

    return Last()


@dataclass(frozen=True)
class Toy:
    """A recipe of three classes over eight features."""

    make: Callable[[], nn.Module] = line
    loss_of: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    labels: tuple[str, ...] = ("a", "b", "c")

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return self.make()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss_of(output, target)

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        raise NotImplementedError(str(path))

    def example(self, rows: int) -> Tensor:
        return torch.randn(rows, 8, generator=torch.Generator().manual_seed(1))


def sites(sizes: Sequence[int], seed: int = 0) -> dict[SiteId, Holding]:
    """Sites of these many rows each, and half as many held out."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for place, size in enumerate(sizes):
        total = size + size // 2
        x = torch.randn(total, 8, generator=generator)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
        found[SiteId(f"site-{place:02d}")] = Holding(
            Rows(x[:size], y[:size]), Rows(x[size:], y[size:])
        )
    return found


def toy_plan(training: Training, strategy: Strategy | None = None, rounds: int = 3) -> Plan:
    strategy = strategy or FedAvg()
    return Plan(
        model="toy",
        recipe=RecipeId("toy", "0" * 64),
        dataset="toy",
        strategy=strategy,
        training=training,
        cohort=cohort(strategy, 1),
        rounds=rounds,
        evaluation=Evaluation(every=1),
    )


def first(recipe: Toy) -> Params:
    return Params(recipe.build().state_dict())
