"""Cyclic weight transfer: Chang et al. 2018, doi:10.1093/jamia/ocy017, cyclical weight transfer.

The model goes from site to site: each trains it for a while, as `training` says, and hands it on.
A round is one site's turn, and a cycle as many rounds as there are sites. They take turns in the
order in which `cohort.sites` lists them, else by name; a site that is not there is passed over.
Invariant: over full batches, one site after another is gradient descent through all of them; with
one site it is training as usual. Whoever sees the coordinator's files sees single sites' updates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fedml.params import Params
from fedml.protocol.tasks import Brief
from fedml.strategies.base import Aggregate, Reducer, ServerState
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class Cyclic:
    """One site trains at a time, and the next one goes on from where it came."""

    reducer: Reducer = field(default_factory=WeightedMean)

    in_turn = True

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model."""
        return Brief(state.params)

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Go all the way that the site went."""
        return FedAvg().advance(state, total)
