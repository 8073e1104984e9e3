"""How much one row, or one site, can move a sum: clipping, and sums made noisy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from fedml.errors import ConfigError, MalformedUpdate
from fedml.params import Params
from fedml.privacy.noise import SecureNoise

MARGIN = 1e-6  # of a clipping norm
UNITS = 2**10  # a score counts in steps of 1/1024, so that its noise can be exact integers


def clip(delta: Params, limit: float) -> Params:
    """Scale `delta` down to L2 norm `limit`, taken over all its tensors together; never up.

    Raises `MalformedUpdate` if the norm is not finite.
    Source: McMahan et al. 2018, arXiv:1710.06963, FlatClip of algorithm 1.
    """
    norm = delta.norm()
    if not math.isfinite(norm):
        raise MalformedUpdate(f"norm is {norm}: the update holds NaN or infinity; drop it")
    return delta * min(1.0, limit / max(norm, 1e-12))


def clip_factors(norms: Tensor, limit: float) -> Tensor:
    """Return what scales vectors of these L2 norms down to `limit`, and 0 where one is not finite.

    Down to a `MARGIN` below the limit, in fact, so that a float64 sum of what they scale moves
    by no more than the limit when a vector joins it, whatever the sum's rounding does. Who
    multiplies by a 0 selects the vector away instead, for 0 * NaN is NaN.
    """
    return (limit * (1 - MARGIN) / norms).nan_to_num_(nan=0.0, posinf=1.0).clamp_(0.0, 1.0)


def noisy_totals(
    scores: Mapping[str, Tensor], rows: int, epsilon: float, noise: SecureNoise
) -> tuple[dict[str, float], float]:
    """Return each score's total and the number of rows, together `epsilon`-DP for one row.

    A row's score is brought into [0, 1], NaN becoming 0, and rounded to 1/1024. One row then
    moves each total, and the count, by at most 1; each gets an equal share of `epsilon` and
    exact discrete Laplace noise of scale (scores + 1) / epsilon. Results may be negative.
    """
    if not 0 < epsilon < math.inf:
        raise ConfigError(f"evaluation epsilon {epsilon}: must be above 0")
    scale = Fraction(len(scores) + 1) / Fraction(epsilon)
    totals = {}
    for name, values in scores.items():
        if values.numel() != rows:
            raise ConfigError(f"score {name!r}: there must be one value a row")  # and no count
        bounded = torch.nan_to_num(values.detach().double(), nan=0.0).clamp(0.0, 1.0)
        units = int((bounded * UNITS).round().long().sum())
        totals[name] = (units + noise.discrete_laplace(scale * UNITS)) / UNITS
    return totals, float(rows + noise.discrete_laplace(scale))
