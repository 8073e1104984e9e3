"""FedDyn: Acar et al. 2021, arXiv:2111.04263, algorithm 1.

With lam_k what site k remembers and h what the server does, zero at first, and N sites in all:
    site    steps along g - lam_k + alpha * (x - w), from w to w_k;  lam_k <- lam_k - alpha * D_k
    server  h <- h - alpha * |S| / N * mean(D_k);  w <- w + mean(D_k) - h / alpha
with D_k = w_k - w. The paper's means are plain ones, ours weigh rows as everywhere here.
Invariants: if every site always answers, h is the mean of all lam_k; at a fixed point no site
moves, lam_k is its gradient there and h is 0, so the gradients' mean is 0: w is the optimum of all
rows, however unlike the sites. Under DP-SGD lam_k is made of noised steps and stays at its site.
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
    share,
)
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class FedDyn:
    """Sites minimise a loss that is bent, round by round, until all agree where to stand.

    `sites` is N, which must be told where a round asks a part of them; 0: each asks all.
    """

    alpha: float = 0.1
    sites: int = 0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("feddyn.alpha", self.alpha, open_=True)
        check_sites("feddyn.sites", self.sites)

    def start(self, params: Params) -> ServerState:
        """Start from `params` with h = 0."""
        return ServerState(params, {"h": params.zeros()})

    def brief(self, state: ServerState) -> Brief:
        """Send the model and `alpha`; h stays on the server."""
        return Brief(state.params, rule="feddyn", settings={"alpha": self.alpha})

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return w + mean(D_k) - h / alpha, with h moved first."""
        weight = self.alpha * share(total.count, self.sites)
        h = state.slots["h"].zip(total.delta, lambda h, d: h - d * weight)
        # delta first: zip keeps the integers of its left side, and those must move the model
        step = total.delta.zip(h, lambda d, h: d - h / self.alpha)
        return ServerState(state.params + step, {"h": h}, state.step + 1)


class Dynamic:
    """Remembers lam_k, and bends the local gradient with it and towards the global model."""

    reports: frozenset[str] = frozenset()
    elementwise = True
    keeps_deltas = True

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return g - lam_k + alpha * (x - w); a site that is new has lam_k = 0."""
        alpha = brief.settings["alpha"]
        pull = params.zip(brief.params, lambda here, there: (here - there) * alpha)
        bent = grads.zip(pull, lambda gradient, back: gradient + back)
        return bent.zip(memory["lam"], lambda gradient, own: gradient - own) if memory else bent

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report nothing more, and keep lam_k - alpha * D_k."""
        alpha = brief.settings["alpha"]
        old = memory["lam"] if memory else delta.zeros()
        return {}, {"lam": old.zip(delta, lambda lam, d: lam - d * alpha)}
