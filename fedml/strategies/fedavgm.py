"""FedAvgM: Hsu, Qi, Brown 2019, arXiv:1909.06335, section 4.3.

m <- beta * m + mean(delta); w <- w + server_lr * m.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fedml.params import Params
from fedml.protocol.tasks import Brief
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class FedAvgM:
    """FedAvg with heavy-ball momentum `beta` on the server."""

    server_lr: float = 1.0
    beta: float = 0.9
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("fedavgm.server_lr", self.server_lr, open_=True)
        check_setting("fedavgm.beta", self.beta, below=1.0)

    def start(self, params: Params) -> ServerState:
        """Start from `params` with m = 0."""
        return ServerState(params, {"m": params.zeros()})

    def brief(self, state: ServerState) -> Brief:
        """Send the model; the momentum stays on the server."""
        return Brief(state.params)

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return w + server_lr * m, with m = beta * m + mean(delta)."""
        # delta first: zip keeps the integers of its left side, and those must move the model
        m = total.delta.zip(state.slots["m"], lambda d, old: torch.add(d, old, alpha=self.beta))
        return ServerState(state.params + m * self.server_lr, {"m": m}, state.step + 1)
