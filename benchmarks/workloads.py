"""The work that simulators are compared on, the same for all: data from a seed, model, steps.

W1 is an image model of 1,626,442 parameters that a core is busy with; W2 a logistic regression
so small that all the time goes into what surrounds it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

DEALT = "FEDML_RACE_DATA"  # environment variable: the folder of rows drawn beforehand


@dataclass(frozen=True)
class Workload:
    """`cohort` of `users` train on their `samples` rows each, once, in batches of `batch`."""

    name: str
    users: int
    samples: int
    cohort: int
    batch: int
    lr: float
    shape: tuple[int, ...]
    classes: int
    noise: float  # standard deviation of a row around its class's template

    def model(self) -> nn.Module:
        """Return a fresh model; its initial values come from torch's global generator."""
        if self.name == "w2":
            return nn.Linear(30, 2)
        return nn.Sequential(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(12544, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
        )

    def data(self) -> tuple[Tensor, Tensor]:
        """Return every user's rows: x [users, samples, *shape], y [users, samples].

        They are read from the folder `DEALT` if it is set, where `deal` has put them.
        """
        if folder := os.environ.get(DEALT):
            x, y = (torch.from_numpy(np.load(Path(folder, f"{self.name}.{p}.npy"))) for p in "xy")
            return x, y
        return self._draw(self.users, self.samples, seed=1)

    def deal(self, folder: Path) -> None:
        """Draw the rows once for all racers: that is nobody's start."""
        for part, values in zip("xy", self._draw(self.users, self.samples, seed=1), strict=True):
            np.save(folder / f"{self.name}.{part}.npy", values.numpy())

    def test(self) -> tuple[Tensor, Tensor]:
        """Return 2000 rows that no user has."""
        x, y = self._draw(1, 2000, seed=2)
        return x[0], y[0]

    def _draw(self, users: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
        templates = torch.randn(
            self.classes, *self.shape, generator=torch.Generator().manual_seed(0)
        )
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(self.classes, (users, samples), generator=generator)
        x = torch.randn(users, samples, *self.shape, generator=generator).mul_(self.noise)
        for user in range(users):
            x[user] += templates[y[user]]
        return x.div_((1 + self.noise**2) ** 0.5), y  # of variance 1


W1 = Workload("w1", 1000, 50, 50, 10, 0.1, (3, 32, 32), 10, 4.0)
W2 = Workload("w2", 10_000, 20, 200, 20, 0.1, (30,), 2, 3.0)
WORKLOADS = {"w1": W1, "w2": W2}


def accuracy(model: nn.Module, workload: Workload) -> float:
    """Return the share of test rows that `model` classifies rightly."""
    x, y = workload.test()
    training = model.training
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(a).argmax(1) == b).sum())
            for a, b in zip(x.split(200), y.split(200), strict=True)
        )
    model.train(training)
    return right / len(y)
