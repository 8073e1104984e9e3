"""Federated PCA: Hartebrodt and Röttger 2022, doi:10.1093/bioadv/vbac026.

With m the mean and C the covariance of all rows, from sums over sites. Where rows have few columns,
sites send second moments: the components are C's first eigenvectors, in one round.
Where they have many, sites send W M, with M the second moments and W the last round's components:
    W <- orthonormal rows of W C = W M - (W m) m^T, turned so that W C W^T is diagonal,
which is orthogonal iteration: errors shrink by the ratio of two eigenvalues, the first that is left
out to the last that is not, a round. Either is PCA of the pooled rows, up to signs.

The model is linear, z = W x + b, with b = -W m: it serves a row's components.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedml.errors import ConfigError
from fedml.params import Layout, Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, Sample, ServerState, check_setting
from fedml.strategies.reducers import WeightedMean

_COLUMNS = "columns"  # how many, in a brief
_WIDEST = 2**24
_MOMENTS = "moments"  # in a brief: 1 if all second moments are wanted


@dataclass(frozen=True)
class PCA:
    """The first principal components of all sites' rows, as many as the model has outputs.

    Up to `columns` columns all second moments are sent, and a first round says all; with more,
    rounds come nearer. Each component's largest weight is positive. `training` is not used.
    """

    columns: int = 500
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("pca.columns", self.columns, below=5001)

    def specimen(self) -> Params:
        """Return a small model of the kind: one linear layer."""
        return Params({"weight": torch.eye(2, 3), "bias": torch.zeros(2)})

    def start(self, params: Params) -> ServerState:
        """Start from the model's weights, made orthonormal; raises `ConfigError` if not linear."""
        weight, bias = _names(params)
        found = params[weight].double()
        if torch.linalg.matrix_rank(found) < len(found):  # as where all are zero
            found = torch.randn(found.shape, generator=torch.Generator().manual_seed(0)).double()
        return ServerState(_model(params, _orthonormal(found), params[bias].double() * 0))

    def brief(self, state: ServerState) -> Brief:
        """Send the components so far, and what is wanted."""
        weight, _ = _names(state.params)
        columns = state.params[weight].shape[1]
        wanted = {_COLUMNS: float(columns), _MOMENTS: float(columns <= self.columns)}
        return Brief(state.params, "pca", wanted)

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return the components of these moments, or nearer ones."""
        weight, bias = _names(state.params)
        mean = total.slots["mean"]["value"].double()
        if _MOMENTS in total.slots:
            moments = total.slots[_MOMENTS]["value"].double()
            _, vectors = torch.linalg.eigh((moments + moments.T) / 2 - torch.outer(mean, mean))
            last = len(state.params[weight])
            found = vectors.T.flip(0)[:last]
        else:
            here = state.params[weight].double()
            sent = total.delta[weight].double()
            ahead = sent - torch.outer(total.delta[bias].double(), mean)  # W C
            inner = ahead @ here.T
            _, turn = torch.linalg.eigh((inner + inner.T) / 2)
            found = _orthonormal(turn.T.flip(0) @ ahead)
        found = _signed(found)
        return ServerState(_model(state.params, found, -found @ mean), step=state.step + 1)


class Moments:
    """Reports the rows' mean, and all second moments, or those along the components, W M and W m.

    All three are slopes of half the mean squared length of the model's outputs W x + b, so the
    model may scale rows first.
    """

    bounded = True

    def reports(self, brief: Brief) -> frozenset[str]:
        """Return what the brief asks for."""
        return frozenset({"mean", _MOMENTS} if brief.settings.get(_MOMENTS) else {"mean"})

    def layouts(self, settings: Mapping[str, float]) -> Mapping[str, Layout]:
        """Return how the slots are laid out: a number a column, and one for each two columns."""
        told = settings.get(_COLUMNS, 0.0)
        columns = int(told) if 0 < told <= _WIDEST else 0  # a brief may be a stranger's
        mean = {"mean": Layout((("value", torch.float64, (columns,)),))}
        if not settings.get(_MOMENTS):
            return mean
        return {**mean, _MOMENTS: Layout((("value", torch.float64, (columns, columns)),))}

    def measure(self, brief: Brief, sample: Sample) -> tuple[Params, Slots]:
        """Return (delta, slots); raises `ConfigError` if outputs are not linear in the model."""
        params = brief.params
        weight, bias = _names(params)
        here, none, ones = params[weight], params[bias] * 0, torch.ones_like(params[bias])
        count, columns = here.shape
        dtype = here.dtype

        def slopes(w: Tensor, b: Tensor) -> Params:
            at = Params({**params, weight: w, bias: b})
            flat = at.buffers[dtype].detach().clone().requires_grad_()
            outputs = sample.outputs(Params.over(at.layout, {**at.buffers, dtype: flat}))
            (found,) = torch.autograd.grad(outputs.square().sum() / (2 * len(outputs)), flat)
            return Params.over(at.layout, {**at.zeros().buffers, dtype: found})

        alone = slopes(here * 0, -ones)  # -1: what cuts off below 0 is not linear
        means = -alone[weight]
        if not (torch.allclose(alone[bias], -ones) and torch.allclose(means, means[:1])):
            raise _not_linear("its outputs are not W x + b of each row")
        slots = {"mean": _wide(means[0])}
        if not brief.settings.get(_MOMENTS):
            return slopes(here, none), slots
        rows = here.new_zeros(columns, columns)
        for first in range(0, columns, count):
            some = min(count, columns - first)
            probe = torch.zeros_like(here)
            probe[:some, first : first + some] = torch.eye(some).to(here)
            rows[first : first + some] = slopes(probe, none)[weight][:some]
        return params.zeros(), {**slots, _MOMENTS: _wide(rows)}


def _wide(values: Tensor) -> Params:
    return Params({"value": values.double()})


def _names(params: Params) -> tuple[str, str]:
    """Return the names of a linear model's weight [k, d] and bias [k]."""
    floats = {name: t for name, t in params.items() if t.is_floating_point()}
    flat = [name for name, t in floats.items() if t.ndim == 1]
    wide = [name for name, t in floats.items() if t.ndim == 2]
    if len(floats) != 2 or len(flat) != 1 or len(wide) != 1:
        told = ", ".join(f"{name} {list(t.shape)}" for name, t in list(params.items())[:5])
        raise _not_linear(f"it has {told or 'none'}")
    weight, bias = floats[wide[0]], floats[flat[0]]
    if len(bias) != len(weight) or len(weight) > weight.shape[1] or bias.dtype != weight.dtype:
        raise _not_linear(f"it has {list(weight.shape)} and {list(bias.shape)}")
    return wide[0], flat[0]


def _not_linear(why: str) -> ConfigError:
    return ConfigError(
        f"pca needs a model that is one linear layer, a weight [components, columns] and a bias, "
        f"with no more components than columns: {why}; use a recipe that builds one"
    )


def _orthonormal(rows: Tensor) -> Tensor:
    found: Tensor = torch.linalg.qr(rows.T).Q.T
    return found


def _signed(rows: Tensor) -> Tensor:
    """Return the same directions, each such that its largest number is positive."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0)


def _model(like: Params, weight: Tensor, bias: Tensor) -> Params:
    names = _names(like)
    new = {name: v.to(like[name].dtype) for name, v in zip(names, (weight, bias), strict=True)}
    return Params({**like, **new})
