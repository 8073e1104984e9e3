"""pFedMe: Dinh et al. 2020, arXiv:2006.08848, algorithm 1.

A site's own model theta_k minimises F_k(theta) + (lam / 2) ||theta - w_k||^2, whose minimum is the
Moreau envelope of F_k at w_k; the sites together minimise the sum of these envelopes over one w.
In a round a site goes from w_k = w. Again and again
    site    takes `inner` steps along grad F_k(theta_k) + lam * (theta_k - w_k),
            then w_k <- w_k - eta * lam * (w_k - theta_k)
    server  w <- (1 - beta) * w + beta * mean(w_k)
Two things that the paper leaves open, or does otherwise: theta_k goes on from where it was, and
each of the `inner` steps takes a batch of its own, not all the same one; with full batches there is
no difference. Steps left over at the end move w_k too. A site is scored with theta_k. Invariants:
at the fixed point each theta_k minimises its bent loss and the mean of w - theta_k is 0; with
eta * lam = 1 and inner = 1 a round of one step is FedAvg. Under DP-SGD theta_k is made of noised
steps, so all that follows from it is hidden as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class PFedMe:
    """Sites learn models of their own near a global one, which follows them."""

    lam: float = 1.0
    eta: float = 0.5
    inner: int = 5
    beta: float = 1.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("pfedme.lam", self.lam, open_=True)
        check_setting("pfedme.eta", self.eta, open_=True)
        check_setting("pfedme.beta", self.beta, open_=True)
        if self.inner < 1:
            raise ConfigError(f"pfedme.inner {self.inner}: must be 1 or more steps")
        if self.eta * self.lam > 1:
            raise ConfigError(
                f"pfedme.eta {self.eta} times lam {self.lam} is above 1: a site's copy of the "
                f"global model would leap over its own one, lower eta to {1 / self.lam:g} or less"
            )

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model, and how sites go."""
        settings = {"lam": self.lam, "eta": self.eta, "inner": float(self.inner)}
        return Brief(state.params, rule="pfedme", settings=settings)

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return w + beta * mean(w_k - w)."""
        return FedAvg(self.beta).advance(state, total)


class Envelope:
    """Walks with theta_k, lets w_k follow it, and reports how far that one came."""

    reports: frozenset[str] = frozenset()

    def begin(self, brief: Brief, memory: Slots) -> Params:
        """Return theta_k; a site that is new has the global model."""
        return memory.get("theta", brief.params)

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return the gradient of the local loss plus (lam / 2) ||theta - w_k||^2."""
        lam, near = brief.settings["lam"], memory.get("near", brief.params)
        pull = params.zip(near, lambda theta, w: (theta - w) * lam)
        return grads.zip(pull, lambda gradient, back: gradient + back)

    def follow(self, brief: Brief, memory: Slots, params: Params, steps: int) -> Slots:
        """Remember w_k as `near`, moved towards theta_k after each `inner` steps."""
        if steps % int(brief.settings["inner"]):
            return memory
        part = brief.settings["eta"] * brief.settings["lam"]
        near = memory.get("near", brief.params).zip(params, lambda w, theta: w - part * (w - theta))
        return {**memory, "near": near}

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report w_k - w, and keep theta_k."""
        theta = self.begin(brief, memory) + delta
        if path["steps"] % brief.settings["inner"]:
            memory = self.follow(brief, memory, theta, 0)
        moved = memory.get("near", brief.params) - brief.params
        return {"delta": delta.zip(moved, lambda _, far: far)}, {"theta": theta}
