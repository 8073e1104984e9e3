"""FedNova: Wang et al. 2020, arXiv:2007.07481, equation 8, for SGD with or without momentum.

With D_k = w_k - w and a_k what site k's path weighs (its number of steps, with momentum |a_k|_1):
    site    sends D_k / a_k, and a_k
    server  w <- w + server_lr * mean(a_k) * mean(D_k / a_k)
Means weigh rows, as the paper's p_k do, and both are sums. Invariants: equal steps everywhere make
it FedAvg; sites of equal curvature end at the optimum of all rows however many steps each takes,
where FedAvg leans to those that step most. Steps are public under DP, so nothing more is spent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedml.params import Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import (
    Aggregate,
    Reducer,
    ServerState,
    check_setting,
    number,
    path_weight,
)
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class FedNova:
    """FedAvg of steps and not of paths: who takes more steps pulls no harder."""

    server_lr: float = 1.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("fednova.server_lr", self.server_lr, open_=True)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model and nothing else."""
        return Brief(state.params, rule="fednova")

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return w + server_lr * mean(a_k) * mean(D_k / a_k)."""
        scale = self.server_lr * total.number("weight")
        return ServerState(state.params + total.delta * scale, step=state.step + 1)


class Normalised:
    """Sends the mean step of a path in the place of the path, and what the path weighs."""

    reports: frozenset[str] = frozenset({"weight"})
    numbers: frozenset[str] = frozenset({"weight"})
    elementwise = True

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return `grads` unchanged."""
        return grads

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report D_k / a_k and a_k; keep nothing."""
        weight = path_weight(path)
        return {"delta": delta * (1 / weight), "weight": number(weight)}, {}
