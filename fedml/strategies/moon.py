"""MOON: Li et al. 2021, arXiv:2103.16257, algorithm 1 and equation 3.

A site adds to each batch's loss the mean over its rows of
    -mu * log(e^(s(z, z_g) / tau) / (e^(s(z, z_g) / tau) + e^(s(z, z_p) / tau)))
where s is the cosine of two representations of a row: z of the model that is trained, z_g of the
global model it started from, z_p of the one that this site ended with last time. So it stays close
to the global one's view of its rows, and goes away from its own old one. A representation is what
the last layer with parameters takes in; a model of one such layer has none, and is refused. The
server averages as FedAvg does. Invariants: mu = 0 is FedAvg, and so is a site's first round, where
z_p would be z_g and the term a constant. Under DP-SGD it is refused: rows' gradients of the term
are not bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional

from fedml.params import Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class Moon:
    """FedAvg whose sites hold their representations close to those of the global model."""

    mu: float = 1.0
    tau: float = 0.5
    server_lr: float = 1.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("moon.mu", self.mu)
        check_setting("moon.tau", self.tau, open_=True)
        check_setting("moon.server_lr", self.server_lr, open_=True)

    def misfits(self, params: Params, rounds: int) -> Iterator[str]:
        """Say that a model has no representation of rows, as far as its names tell."""
        layers = {name.rpartition(".")[0] for name in params}
        if len(layers) < 2:
            told = f"it has {', '.join(sorted(params)[:4])} alone" if params else "it has nothing"
            yield (
                f"strategy Moon with a model of {len(layers)} layer ({told}): there is no "
                "representation of rows to compare; use strategy=fedavg, or a model with a hidden "
                "layer"
            )

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model, `mu` and `tau`."""
        return Brief(state.params, rule="moon", settings={"mu": self.mu, "tau": self.tau})

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Advance as FedAvg does."""
        return FedAvg(self.server_lr).advance(state, total)


class Views:
    """Adds the contrast of representations to the loss, and keeps the model it ends with."""

    reports: frozenset[str] = frozenset()

    def others(self, brief: Brief, memory: Slots) -> tuple[Params, ...]:
        """Return the global model and this site's last one; nothing where the term is constant."""
        return (brief.params, memory["last"]) if memory and brief.settings["mu"] else ()

    def term(self, brief: Brief, mine: Tensor, theirs: Sequence[Tensor]) -> Tensor:
        """Return equation 3's mean over the rows, times `mu`."""
        near, far = (functional.cosine_similarity(mine, other, dim=1) for other in theirs)
        loss: Tensor = functional.softplus((far - near) / brief.settings["tau"]).mean()
        return loss * brief.settings["mu"]

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return `grads` unchanged: they have the term's in them."""
        return grads

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report nothing more, and keep the local model."""
        return {}, {"last": brief.params + delta}
