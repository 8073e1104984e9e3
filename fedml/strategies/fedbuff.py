"""FedBuff: Nguyen et al. 2022, arXiv:2106.06639, algorithm 1.

w <- w + server_lr * (sum_k n_k * s(t_k) * D_k) / (sum_k n_k), over a buffer of K updates, with
s(t) = (1 + t)^-staleness for one that was made from the model of t steps ago. The paper has equal
n_k, and server_lr as its eta_g. With no staleness it is FedAvg over the buffer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedml.params import Params
from fedml.protocol.tasks import Brief
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting
from fedml.strategies.buffering import Buffering
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class FedBuff:
    """Step as soon as `buffer` updates are there, old ones shrunk by `staleness`.

    `buffer` 0 stands for `cohort.quorum`. Nobody is waited for who would be more than
    `max_staleness` steps late.
    """

    buffer: int = 0
    staleness: float = 0.5
    max_staleness: int = 20
    server_lr: float = 1.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        self.buffering.check("fedbuff")
        check_setting("fedbuff.server_lr", self.server_lr, open_=True)

    @property
    def buffering(self) -> Buffering:
        """Updates are shrunk as they come, so that the step is that of a plain mean."""
        return Buffering(self.buffer, self.staleness, self.max_staleness)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model and nothing else."""
        return Brief(state.params)

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return w + server_lr * mean(s * delta)."""
        return ServerState(state.params + total.delta * self.server_lr, step=state.step + 1)
