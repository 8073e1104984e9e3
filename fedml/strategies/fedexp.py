"""FedExP: Jhunjhunwala, Wang, Joshi 2023, arXiv:2301.09604, algorithm 1.

With D_k = w_k - w:
    site    sends D_k, and ||D_k||^2
    server  w <- w + eta * mean(D_k),  eta = max(1, mean(||D_k||^2) / (2 (||mean(D_k)||^2 + eps)))
Means weigh rows. Invariants: eta >= 1, so no step is shorter than FedAvg's; one site, or sites that
agree, make it FedAvg; sites that pull apart lengthen the step. The paper offers the mean of the
last two models as its result; what stands here is the last one. Under DP-SGD the norm is that of
a noised delta, so it costs nothing more, but noise too makes steps longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedml.params import Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting, number
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class FedExP:
    """FedAvg with a step that grows as sites' updates cancel each other; `eps` bounds it."""

    eps: float = 1e-3
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("fedexp.eps", self.eps, open_=True)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model and nothing else."""
        return Brief(state.params, rule="fedexp")

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return w + eta * mean(D_k)."""
        apart, together = total.number("square"), total.delta.norm() ** 2
        eta = max(1.0, apart / (2 * (together + self.eps)))
        return ServerState(state.params + total.delta * eta, step=state.step + 1)


class Squared:
    """Reports the squared norm of a delta beside it."""

    reports: frozenset[str] = frozenset({"square"})
    numbers: frozenset[str] = frozenset({"square"})
    elementwise = True

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return `grads` unchanged."""
        return grads

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report ||D_k||^2; keep nothing."""
        return {"square": number(delta.norm() ** 2)}, {}
