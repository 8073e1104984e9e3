"""Ditto: Li et al. 2021, arXiv:2012.04221, algorithm 1.

Each site has a model v_k of its own beside the global w. In a round it trains w on its rows as
FedAvg's sites do, and v_k, with as many steps over the same batches, along
    grad F_k(v_k) + lam * (v_k - w)
towards the w that it was sent. The server averages what became of w; v_k stays at home, and a site
is scored with it. A site's first v_k is the w that it first gets. Invariants: w goes as in FedAvg,
to the bit; with lam = 0 each v_k is what its site would have learnt alone, and the larger lam the
nearer it is to w. Choose lam below 2 / lr, or v_k oscillates.

Under privacy w is bounded and hidden as in FedAvg. v_k is not, for it never leaves; nor may its
scores then, and a plan that asks for them is refused.
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
class Ditto:
    """FedAvg whose sites have models of their own, pulled to the global one by `lam`."""

    lam: float = 0.1
    server_lr: float = 1.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("ditto.lam", self.lam)
        check_setting("ditto.server_lr", self.server_lr, open_=True)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model and `lam`."""
        return Brief(state.params, rule="ditto", settings={"lam": self.lam})

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Advance as FedAvg does."""
        return FedAvg(self.server_lr).advance(state, total)


class Own:
    """Trains the global model plainly, and keeps one of its own close to it."""

    reports: frozenset[str] = frozenset()

    def begin(self, brief: Brief, memory: Slots) -> Params:
        """Return v_k; a site that is new has the global model."""
        return memory["own"] if memory else brief.params

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return `grads` unchanged."""
        return grads

    def own_gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return the gradient of the local loss plus (lam / 2) ||v - w||^2."""
        lam = brief.settings["lam"]
        pull = params.zip(brief.params, lambda here, there: (here - there) * lam)
        return grads.zip(pull, lambda gradient, back: gradient + back)

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report nothing more, and keep v_k."""
        return {}, {"own": self.begin(brief, memory)}
