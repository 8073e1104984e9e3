"""q-FedAvg: Li, Sanjabi, Beirami, Smith 2020, arXiv:1905.10497, algorithm 2, with L = 1 / lr.

With D_k = w_k - w and F_k site k's loss at w, over all its rows:
    site    sends F_k^q * D_k, and h_k = q * F_k^(q-1) * ||D_k||^2 / lr + F_k^q
    server  w <- w + server_lr * mean(F_k^q * D_k) / mean(h_k)
which is the paper's fraction with both its sides times lr. Means weigh rows, as the paper draws
its sites. What is minimised is mean(F_k^(q+1)) / (q + 1): the
larger q, the more alike the sites' losses. Invariant: q = 0 is FedAvg. Both means are sums of what
each site makes of its own loss, so no site's loss need be seen; but it is an exact number made of
rows, so record privacy refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedml.errors import TaskFailed
from fedml.params import Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting, number
from fedml.strategies.reducers import WeightedMean

LEAST = 1e-10  # of a loss, so that its powers are finite


@dataclass(frozen=True)
class QFedAvg:
    """FedAvg that listens more to sites whose loss is large, the more the larger `q` is."""

    q: float = 1.0
    server_lr: float = 1.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("qfedavg.q", self.q)
        check_setting("qfedavg.server_lr", self.server_lr, open_=True)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model and `q`."""
        return Brief(state.params, rule="qfedavg", settings={"q": self.q})

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return w + server_lr * mean(F_k^q * D_k) / mean(h_k)."""
        h = total.number("h")
        scale = self.server_lr / h if h else 0.0  # all losses are too small for their powers
        return ServerState(state.params + total.delta * scale, step=state.step + 1)


class Fair:
    """Scales a delta by a power of its site's loss at the global model."""

    reports: frozenset[str] = frozenset({"h"})
    numbers: frozenset[str] = frozenset({"h"})
    reads_loss = True

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return `grads` unchanged."""
        return grads

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report F_k^q * D_k and h_k; keep nothing."""
        q, loss = brief.settings["q"], path["loss"]
        if not 0 <= loss < math.inf:
            raise TaskFailed(
                f"a loss of {loss:g}: its power needs a loss of 0 or more; use strategy=fedavg"
            )
        loss = max(loss, LEAST)
        h = q * loss ** (q - 1) * delta.norm() ** 2 / path["lr"] + loss**q
        return {"delta": delta * loss**q, "h": number(h)}, {}
