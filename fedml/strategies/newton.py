"""Federated Newton: Wu, Jiang, Kim and Ohno-Machado 2012, doi:10.1136/amiajnl-2012-000862 (GLORE).

With g_k and H_k the gradient and Hessian of site k's mean loss at w:
    w <- w - server_lr * (H + ridge * I)^-1 g,  g = sum_k (n_k / n) g_k,  H = sum_k (n_k / n) H_k.
For a generalised linear model this is Newton's method on the pooled rows, so it converges to the
pooled maximum likelihood in a handful of rounds, whatever the sites' differences. A float64 model
gets there to the last digits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, Sample, ServerState, check_setting
from fedml.strategies.reducers import WeightedMean

MOST = 500  # parameters; a site sends the square of that


@dataclass(frozen=True)
class Newton:
    """Newton's method on all sites' rows; `ridge` steadies a Hessian that is nearly singular.

    A direction that no row says anything about is left alone. `training` is not used: sites
    measure, they do not descend.
    """

    server_lr: float = 1.0
    ridge: float = 0.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("newton.server_lr", self.server_lr, open_=True)
        check_setting("newton.ridge", self.ridge)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots; raises `ConfigError` for a model that is too big."""
        _floats(params)
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model, at which sites measure."""
        return Brief(state.params, rule="newton")

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return w - server_lr * (H + ridge * I)^-1 g."""
        dtype, size = _floats(state.params)
        down = total.delta.buffers[dtype].double()  # sites send -g, as if they had stepped along it
        rows = [total.slots[name].buffers[dtype].double() for name in _columns(size)]
        hessian = torch.stack(rows) + self.ridge * torch.eye(size, dtype=torch.float64)
        step = self.server_lr * torch.linalg.pinv(hessian, hermitian=True) @ down
        moved = Params.over(state.params.layout, {**total.delta.buffers, dtype: step.to(dtype)})
        return ServerState(state.params + moved, step=state.step + 1)


class Curvature:
    """Reports a site's Hessian, a row of it in each slot, and minus its gradient as the delta."""

    def reports(self, brief: Brief) -> frozenset[str]:
        """Return a slot's name for each parameter."""
        return frozenset(_columns(_floats(brief.params)[1]))

    def measure(self, brief: Brief, sample: Sample) -> tuple[Params, Slots]:
        """Return (-g, H), in the model's own precision."""
        params = brief.params
        dtype, size = _floats(params)

        def along(flat: Tensor) -> Tensor:
            return sample.loss(Params.over(params.layout, {**params.buffers, dtype: flat}))

        def shaped(values: Tensor) -> Params:
            return Params.over(params.layout, {**params.zeros().buffers, dtype: values.detach()})

        at = params.buffers[dtype].detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(along(at), at, create_graph=True)
        rows = [torch.autograd.grad(one, at, retain_graph=True)[0] for one in gradient]
        slots = {name: shaped(row) for name, row in zip(_columns(size), rows, strict=True)}
        return shaped(-gradient), slots


def _floats(params: Params) -> tuple[torch.dtype, int]:
    """Return the one floating dtype of `params`, and how many elements it has."""
    layout = params.layout.sizes
    sizes = [(dtype, size) for dtype, size in layout.items() if dtype.is_floating_point]
    if len(sizes) != 1 or not 1 <= sizes[0][1] <= MOST:
        told = ", ".join(f"{size} of {dtype}" for dtype, size in sizes) or "none"
        raise ConfigError(
            f"newton needs a model with 1 to {MOST} parameters of one floating dtype, this has "
            f"{told}; use strategy=fedavg"
        )
    return sizes[0]


def _columns(size: int) -> list[str]:
    return [f"hessian.{row}" for row in range(size)]
