"""Federated L-BFGS: Liu and Nocedal 1989, doi:10.1007/BF01589116, algorithm 2.1.

With f and g the loss and gradient of all rows, as sums over sites, and H the inverse Hessian that
the last m pairs s = x' - x, y = g' - g tell of (Nocedal 1980, two loops):
    x' = x - t H g,  t = 1, or less after a step that did not lower f enough.
A step is taken if it keeps Armijo's rule, or, where losses differ by rounding alone, that of slopes
(Hager and Zhang 2005, doi:10.1137/030601880). For a generalised linear model this
comes to the pooled maximum likelihood, at the cost of a gradient a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, Sample, ServerState, check_setting, number
from fedml.strategies.reducers import WeightedMean

_ENOUGH = 1e-4  # of the fall that the slope promises
_ROUNDING = 1e-9  # losses that differ by less are alike
_SHORTER, _LONGER = 0.1, 0.5  # how long a second try is at least and at most, of the first
_MOST = 1000.0  # told of how much a loss changes: sums of more would not hold many rows


@dataclass(frozen=True)
class LBFGS:
    """L-BFGS on all sites' rows, with the last `memory` pairs; a round measures one point.

    A point that is no better is left, so a run's last model is the point that a next round would
    have measured. `training` is not used: sites measure, they do not descend.
    """

    memory: int = 5
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("lbfgs.memory", self.memory, least=1, below=101)
        if self.memory != int(self.memory):
            raise ConfigError(f"lbfgs.memory {self.memory}: give a whole number of pairs")

    def start(self, params: Params) -> ServerState:
        """Start at `params`, knowing of no other point."""
        if not len(_flat(params)):
            raise ConfigError("lbfgs needs a model with floating parameters, this has none")
        names = [f"{what}.{k}" for what in "sy" for k in range(self.memory)]
        return ServerState(params, {"base": params, **dict.fromkeys(
            ["gradient", *names], params.zeros()
        )})  # fmt: skip

    def brief(self, state: ServerState) -> Brief:
        """Send the point to be measured, and the one that it is to be better than."""
        return Brief(state.params, "lbfgs", slots={"base": state.slots["base"]})

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return the next point to be measured: beyond this one, or nearer to the one before."""
        counted = state.params + total.delta  # for its integers
        here, base = _flat(state.params), _flat(state.slots["base"])
        gradient, before = -_flat(total.delta), _flat(state.slots["gradient"])
        step, rise = here - base, total.number("rise")
        slope = float(before @ step)
        lost = total.number("lost") > 0
        if state.step and (lost or not _is_taken(rise, slope, float(gradient @ step))):
            nearer = base + (_SHORTER if lost else _shortened(rise, slope)) * step
            return ServerState(_shaped(counted, nearer), state.slots, state.step + 1)
        pairs, slots = self._pairs(state), dict(state.slots)
        change = gradient - before
        if state.step and float(step @ change) > 1e-12 * float(change @ change):
            pairs = [*pairs, (step, change)][-self.memory :]
        like = state.params.zeros()
        for k, pair in enumerate(pairs):
            slots |= {f"{n}.{k}": _shaped(like, v) for n, v in zip("sy", pair, strict=True)}
        slots |= {"base": state.params, "gradient": _shaped(like, gradient)}
        beyond = here - _times_inverse(pairs, gradient)
        return ServerState(_shaped(counted, beyond), slots, state.step + 1)

    def _pairs(self, state: ServerState) -> list[tuple[Tensor, Tensor]]:
        """Return what is known of the curvature, the oldest first."""
        slots = state.slots
        flat = [(_flat(slots[f"s.{k}"]), _flat(slots[f"y.{k}"])) for k in range(self.memory)]
        return [(s, y) for s, y in flat if float(s @ y) > 0]


class Slope:
    """Reports minus the gradient at the model, as the delta, and by how much the loss rose.

    Where it rose beyond all bounds, or is no number, `lost` is 1 and all else says nothing: then no
    site's answer makes the step a good one.
    """

    numbers = frozenset({"lost", "rise"})

    def reports(self, brief: Brief) -> frozenset[str]:
        """Return the names of the two numbers."""
        return self.numbers

    def measure(self, brief: Brief, sample: Sample) -> tuple[Params, Slots]:
        """Return (-g, loss here less that at the base), in the model's own precision."""
        leaves = {
            dtype: buffer.detach().clone().requires_grad_(dtype.is_floating_point)
            for dtype, buffer in brief.params.buffers.items()
        }
        at = sample.loss(Params.over(brief.params.layout, leaves))
        with torch.no_grad():
            rise = float(at) - float(sample.loss(brief.slots["base"]))
        if not rise < _MOST:  # NaN is not
            return brief.params.zeros(), {"rise": number(0.0), "lost": number(1.0)}
        inner = [leaf for leaf in leaves.values() if leaf.requires_grad]
        slopes = iter(torch.autograd.grad(at, inner))
        still = brief.params.zeros().buffers
        down = {d: -next(slopes) if d.is_floating_point else still[d] for d in leaves}
        told = {"rise": number(max(rise, -_MOST)), "lost": number(0.0)}
        return Params.over(brief.params.layout, down), told


def _is_taken(rise: float, slope: float, after: float) -> bool:
    """Return whether a step along which the loss rose so much, with these slopes, is a good one."""
    alike = rise <= _ROUNDING and after <= (2 * _ENOUGH - 1) * slope
    return rise <= _ENOUGH * slope or alike


def _shortened(rise: float, slope: float) -> float:
    """Return where the parabola through a step's start and end is lowest, within bounds."""
    bend = rise - slope
    lowest = -slope / (2 * bend) if bend > 0 else _LONGER
    return min(_LONGER, max(_SHORTER, lowest))


def _times_inverse(pairs: Sequence[tuple[Tensor, Tensor]], gradient: Tensor) -> Tensor:
    """Return H g by two loops over the pairs; without any, g, no longer than 1."""
    found, shares = gradient.clone(), list[Tensor]()
    for s, y in reversed(pairs):
        shares.append((s @ found) / (s @ y))
        found -= shares[-1] * y
    if pairs:
        s, y = pairs[-1]
        found *= (s @ y) / (y @ y)
    else:
        found /= max(1.0, float(found.norm()))
    for (s, y), share in zip(pairs, reversed(shares), strict=True):
        found += (share - (y @ found) / (s @ y)) * s
    return found


def _flat(params: Params) -> Tensor:
    """Return all floating numbers as one vector."""
    floats = [b.double() for d, b in params.buffers.items() if d.is_floating_point]
    return torch.cat(floats) if floats else torch.zeros(0, dtype=torch.float64)


def _shaped(like: Params, flat: Tensor) -> Params:
    """Return `like` with the numbers of `flat` in the place of its floating ones."""
    buffers, start = dict(like.buffers), 0
    for dtype, size in like.layout.sizes.items():
        if dtype.is_floating_point:
            buffers[dtype] = flat[start : start + size].to(dtype)
            start += size
    return Params.over(like.layout, buffers)
