"""SCAFFOLD: Karimireddy et al. 2020, arXiv:1910.06378, algorithm 1 with option II.

With control variates c of the server and c_k of site k, all zero at first, and N sites in all:
    site    y <- y - lr * (g - c_k + c);  c_k' = c_k - c + (w - y) / (tau * lr)
    server  w <- w + server_lr * mean(y - w);  c <- c + |S| / N * mean(c_k' - c_k)
The paper's means are plain ones, ours weigh rows as everywhere here, so what is minimised is the
loss of all rows. Invariants: if every site always answers, c is the mean of all c_k; one site with
full batches does gradient descent; where all c_k are the gradients at the pooled optimum, and c is
their mean, no site moves away from it, however many its steps. Under DP-SGD c_k is made of noised
steps alone, so it costs nothing more.
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
    check_sites,
    path_weight,
    share,
)
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class Scaffold:
    """FedAvg whose sites steer against their drift from the common gradient.

    `sites` is N, which must be told where a round asks a part of them; 0: each asks all. A site
    whose update misses the deadline has moved its c_k all the same; c lags by that much.
    """

    server_lr: float = 1.0
    sites: int = 0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("scaffold.server_lr", self.server_lr, open_=True)
        check_sites("scaffold.sites", self.sites)

    def start(self, params: Params) -> ServerState:
        """Start from `params` with c = 0."""
        return ServerState(params, {"c": params.zeros()})

    def brief(self, state: ServerState) -> Brief:
        """Send the model and c, which makes the brief twice as large."""
        return Brief(state.params, rule="scaffold", slots={"c": state.slots["c"]})

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return w + server_lr * mean(delta), and c moved by the answering sites' part of N."""
        moved = total.slots["moved"] * share(total.count, self.sites)
        params = state.params + total.delta * self.server_lr
        return ServerState(params, {"c": state.slots["c"] + moved}, state.step + 1)


class Control:
    """Remembers c_k, adds c - c_k to the local gradient and reports how c_k has moved.

    Momentum weighs the gradients of a path unevenly; c_k' is then their mean by those weights.
    """

    reports: frozenset[str] = frozenset({"moved"})
    elementwise = True

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return g - c_k + c; a site that is new has c_k = 0."""
        bent = grads.zip(brief.slots["c"], lambda gradient, common: gradient + common)
        return bent.zip(memory["c"], lambda gradient, own: gradient - own) if memory else bent

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report c_k' - c_k = -c - delta / (tau * lr), and keep c_k'."""
        scale = 1 / (path_weight(path) * path["lr"])
        common = brief.slots["c"]  # on the left: its integers are zero, the delta's count batches
        moved = common.zip(delta, lambda c, d: -c - d * scale)
        return {"moved": moved}, {"c": memory["c"] + moved if memory else moved}
