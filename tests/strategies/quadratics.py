"""Sites whose losses are quadratics in float64, for algorithms whose answers can be worked out.

Site k has F_k(w) = sum(curve_k (w - centre_k)^2) / 2 + floor_k, and takes full batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fedml.params import Params, decode, encode
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.tasks import Brief, Slots, Update
from fedml.strategies import RULES, Follower, ServerState, Strategy, Twofold, first_model, own_model

Bend = Callable[[Brief, Slots, Params, Params], Params]
Vector = NDArray[np.float64]
CENTRES = np.array([[1.0, -2.0, 0.5], [3.0, 4.0, -1.0], [-5.0, 0.25, 2.0]])
CURVES = np.array([[1.0, 0.5, 2.0], [0.3, 1.5, 1.0], [0.7, 0.2, 0.4]])
FLOORS = np.array([0.1, 0.0, 2.0])
SIZES = np.array([10.0, 30.0, 5.0])
SHARES = SIZES / SIZES.sum()
OPTIMUM = (SHARES @ (CURVES * CENTRES)) / (SHARES @ CURVES)  # of sum_k (n_k / n) F_k


def params(values: Vector) -> Params:
    return Params({"w": torch.tensor(values, dtype=torch.float64)})


def gradient(site: int, w: Vector) -> Vector:
    return np.asarray(CURVES[site] * (w - CENTRES[site]))


def loss(site: int, w: Vector) -> float:
    return float(0.5 * np.sum(CURVES[site] * (w - CENTRES[site]) ** 2) + FLOORS[site])


def descend(site: int, w: Vector, lr: float, steps: int) -> Vector:
    """The papers' side: where plain local steps end."""
    for _ in range(steps):
        w = w - lr * gradient(site, w)
    return w


@dataclass
class Quadratics:
    """A federation of these sites; it remembers what its sites keep, as disks would."""

    strategy: Strategy
    lr: float = 0.1
    steps: Sequence[int] = (4, 4, 4)
    momentum: float = 0.0
    memory: dict[int, Slots] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = self.strategy.start(params(np.zeros(3)))

    @property
    def w(self) -> Vector:
        return np.asarray(self.state.params["w"].numpy())

    def update(self, brief: Brief, site: int) -> Update:
        """What a site sends; it keeps what its rule remembers."""
        rule, memory = RULES[brief.rule], self.memory.get(site, {})

        def descended(here: Params, bend: Bend) -> Params:
            nonlocal memory
            velocity = params(np.zeros(3))
            for step in range(1, 1 + self.steps[site]):
                plain = params(gradient(site, here["w"].numpy()))
                velocity = velocity * self.momentum + bend(brief, memory, here, plain)
                here = here - velocity * self.lr
                if isinstance(rule, Follower):
                    memory = rule.follow(brief, memory, here, step)
            return here

        start = first_model(brief, memory)
        delta = descended(start, rule.gradient) - start
        if isinstance(rule, Twofold):
            own = descended(own_model(brief, memory), rule.own_gradient)
            memory = {**memory, "own": own}
        path = {"lr": self.lr, "momentum": self.momentum, "steps": float(self.steps[site])}
        path["loss"] = loss(site, brief.params["w"].numpy())
        told, self.memory[site] = rule.finish(brief, memory, delta, path)
        slots = dict(told)
        sent = slots.pop("delta", delta)
        name = SiteId(f"site-{site}")
        return Update(TaskId(name), self.state.step + 1, name, sent, float(SIZES[site]), slots)

    def play(self, rounds: int, cohort: Sequence[int] = (0, 1, 2)) -> Vector:
        """Return the model after so many more rounds with these sites."""
        for _ in range(rounds):
            brief, reduction = self.strategy.brief(self.state), self.strategy.reducer.start()
            for site in cohort:
                reduction.add(self.update(brief, site))
            self.state = self.strategy.advance(self.state, reduction.result())
        return self.w

    def restarted(self) -> Quadratics:
        """The same federation after everything was written down and read back."""
        parts = {"": self.state.params, **self.state.slots}
        read = decode(b"".join(encode(parts)))
        memory: dict[int, Slots] = {
            site: decode(b"".join(encode(slots))) if slots else {}
            for site, slots in self.memory.items()
        }
        again = Quadratics(self.strategy, self.lr, self.steps, self.momentum, memory)
        again.state = ServerState(read.pop(""), read, self.state.step)
        return again
