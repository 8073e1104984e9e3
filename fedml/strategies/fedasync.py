"""FedAsync: Xie, Koyejo & Gupta 2019, arXiv:1903.03934, algorithm 1.

w <- (1 - a) * w + a * w_k, with a = alpha * s(t) and s(t) = (1 + t)^-staleness (the paper's
polynomial), for the model w_k that a site made of the model of t steps ago. Each update is a step.
Sites minimise F_k(w) + (mu / 2) ||w - w_t||^2, the paper's g with its rho as mu, for the model w_t
that they were sent; with mu = 0, the default, their loss alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.protocol.tasks import Brief
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting
from fedml.strategies.buffering import Buffering
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class FedAsync:
    """Mix each model that comes into the global one, by `alpha`, less if it is stale.

    Sites are pulled back to the model that they were sent with strength `mu`.
    """

    alpha: float = 0.6
    staleness: float = 0.5
    max_staleness: int = 20
    mu: float = 0.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        self.buffering.check("fedasync")
        check_setting("fedasync.mu", self.mu)
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"fedasync.alpha {self.alpha}: must be above 0 and at most 1")

    @property
    def buffering(self) -> Buffering:
        """Every update is a step, towards the model that it is a part of."""
        return Buffering(1, self.staleness, self.max_staleness, mixes_models=True)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model, and `mu` where there is one."""
        if not self.mu:
            return Brief(state.params)
        return Brief(state.params, rule="prox", settings={"mu": self.mu})

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return w + alpha * s * (w_k - w)."""
        return ServerState(state.params + total.delta * self.alpha, step=state.step + 1)
