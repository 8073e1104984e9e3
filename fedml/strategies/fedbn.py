"""FedBN: Li et al. 2021, arXiv:2102.07623, algorithm 1.

FedAvg of all parameters but those of normalisation layers, which stay at home: sites whose inputs
differ in scale or contrast each keep their own statistics. Batch normalisation is found by its
running mean, other layers by their names; all else is as in FedPer, with the same invariants. A
model with none of them is averaged whole, as by FedAvg. Under DP-SGD there is no batch
normalisation, and the group or layer normalisation that stands in for it stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedml.params import Params
from fedml.protocol.tasks import Brief
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.fedper import LIKELY
from fedml.strategies.reducers import WeightedMean

_MEAN = ".running_mean"


@dataclass(frozen=True)
class FedBN:
    """FedAvg of all but normalisation layers, which `home` finds by patterns of their names."""

    home: tuple[str, ...] = ("*bn*", "*norm*")
    server_lr: float = 1.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        object.__setattr__(self, "home", tuple(self.home))
        check_setting("fedbn.server_lr", self.server_lr, open_=True)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model, and what of it stays at home; a pattern may match nothing."""
        batch = [f"{name[: -len(_MEAN)]}.*" for name in state.params if name.endswith(_MEAN)]
        settings = dict.fromkeys([*self.home, *batch], LIKELY)
        return Brief(state.params, rule="home", settings=settings)

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Advance as FedAvg does; what stays at home is told to be zero."""
        return FedAvg(self.server_lr).advance(state, total)
