"""FedOpt: Reddi et al. 2021, arXiv:2003.00295, algorithm 2.

With D the mean update:  m <- beta1 * m + (1 - beta1) * D
  FedAdagrad  v <- v + D^2
  FedYogi     v <- v - (1 - beta2) * D^2 * sign(v - D^2)
  FedAdam     v <- beta2 * v + (1 - beta2) * D^2
w <- w + server_lr * m / (sqrt(v) + tau), v starting at tau^2. There is no bias correction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fedml.params import Params
from fedml.protocol.tasks import Brief
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting
from fedml.strategies.reducers import WeightedMean


@dataclass(frozen=True)
class _FedOpt:
    """What the three share; each says how v moves in `_second`."""

    server_lr: float = 0.1
    beta1: float = 0.9
    tau: float = 1e-3  # adaptivity; also the initial v is tau squared, as in the paper
    reducer: Reducer = field(default_factory=WeightedMean, kw_only=True)

    def __post_init__(self) -> None:
        name = type(self).__name__.lower()
        check_setting(f"{name}.server_lr", self.server_lr, open_=True)
        check_setting(f"{name}.beta1", self.beta1, below=1.0)
        check_setting(f"{name}.tau", self.tau, open_=True)

    def start(self, params: Params) -> ServerState:
        """Start from `params` with m = 0 and v = tau^2."""
        zeros = params.zeros()
        return ServerState(params, {"m": zeros, "v": zeros.map(lambda t: t + self.tau**2)})

    def brief(self, state: ServerState) -> Brief:
        """Send the model; the moments stay on the server."""
        return Brief(state.params)

    def _advance(
        self, state: ServerState, total: Aggregate, second: Callable[[Tensor, Tensor], Tensor]
    ) -> ServerState:
        """Return w + server_lr * m / (sqrt(v) + tau), with v = second(old v, D^2)."""
        first = self.beta1
        m = state.slots["m"].zip(total.delta, lambda m, d: m * first + d * (1 - first))
        v = state.slots["v"].zip(total.delta, lambda v, d: second(v, d.square()))
        ratio = m.zip(v, lambda m, v: m / (v.sqrt() + self.tau))
        # delta first: zip keeps the integers of its left side, and those must move the model
        step = total.delta.zip(ratio, lambda _, r: r * self.server_lr)
        return ServerState(state.params + step, {"m": m, "v": v}, state.step + 1)


@dataclass(frozen=True)
class FedAdagrad(_FedOpt):
    """Adagrad on the server: steps shrink with all the movement so far."""

    beta1: float = 0.0

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return the state after one Adagrad step along the mean update."""
        return self._advance(state, total, lambda v, squares: v + squares)


@dataclass(frozen=True)
class FedAdam(_FedOpt):
    """Adam on the server: steps shrink with recent movement, forgotten at rate `beta2`."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("fedadam.beta2", self.beta2, below=1.0)

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return the state after one Adam step along the mean update."""
        keep = self.beta2
        return self._advance(state, total, lambda v, s: v * keep + s * (1 - keep))


@dataclass(frozen=True)
class FedYogi(_FedOpt):
    """Yogi on the server: as Adam, but v moves by no more than (1 - `beta2`) of D^2."""

    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        check_setting("fedyogi.beta2", self.beta2, below=1.0)

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return the state after one Yogi step along the mean update."""
        keep = self.beta2
        return self._advance(state, total, lambda v, s: v - (1 - keep) * s * (v - s).sign())
