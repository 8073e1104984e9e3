"""FedProx: Li et al. 2020, arXiv:1812.06127, equation 2.

Each site minimises F_k(w) + (mu / 2) ||w - w_global||^2; the server averages as FedAvg does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedml.params import Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class FedProx:
    """FedAvg whose sites are pulled back to the global model with strength `mu`."""

    mu: float = 0.01
    server_lr: float = 1.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("fedprox.mu", self.mu)
        check_setting("fedprox.server_lr", self.server_lr, open_=True)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model and `mu`."""
        return Brief(state.params, rule="prox", settings={"mu": self.mu})

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Advance as FedAvg does."""
        return FedAvg(self.server_lr).advance(state, total)


class Prox:
    """Adds mu * (w - w_global) to the local gradient; it reads no row."""

    reports: frozenset[str] = frozenset()
    elementwise = True

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return the gradient of the local loss plus (mu / 2) ||w - w_global||^2."""
        mu = brief.settings["mu"]
        pull = params.zip(brief.params, lambda here, there: (here - there) * mu)
        return grads.zip(pull, lambda gradient, back: gradient + back)

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report and keep nothing."""
        return {}, {}
