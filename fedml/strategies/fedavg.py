"""FedAvg: McMahan et al. 2017, arXiv:1602.05629, algorithm 1.

w <- w + server_lr * sum_k (n_k / n) * (w_k - w); server_lr = 1 is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedml.params import Params
from fedml.protocol.tasks import Brief
from fedml.strategies.averaging import averaged, latest
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class FedAvg:
    """Move the global model by the mean update, scaled by `server_lr`.

    From round `average_from` on the run's model is the mean of that round's and all later ones,
    see `averaging`; 0 leaves it the last.
    """

    server_lr: float = 1.0
    average_from: int = 0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("fedavg.server_lr", self.server_lr, open_=True)
        check_setting("fedavg.average_from", self.average_from)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model and nothing else."""
        return Brief(latest(state))

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return w + server_lr * mean(delta), or the mean of the last such w."""
        moved = latest(state) + total.delta * self.server_lr
        return averaged(state, moved, self.average_from)
