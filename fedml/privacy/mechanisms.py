"""How much one row, or one site, can move a sum: clipping, and sums made noisy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from fedml.errors import ConfigError, MalformedUpdate
from fedml.params import Params
from fedml.privacy.noise import SecureNoise

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


def clipped_sum(rows: Sequence[Tensor], limit: float) -> list[Tensor]:
    """Return float64 sums over rows, each row first scaled down to L2 norm `limit`.

    `rows` holds one tensor [n, ...] for each parameter; a row's norm is taken over all of them.
    A row with NaN or infinity counts as zero. Adding or removing a row moves the sums, taken
    together, by at most `limit`.
    """
    flat = [part.flatten(1) if part.ndim > 1 else part[:, None] for part in rows]
    squares = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float64) ** 2 for part in flat]
    norms = torch.stack(squares).sum(0).sqrt()
    finite = norms.isfinite()
    factors = (limit / norms.clamp(min=1e-12)).clamp(max=1.0)
    if not bool(finite.all()):  # selected away, for 0 * NaN is NaN
        flat, factors = [part[finite] for part in flat], factors[finite]
    sums = [factors @ part.double() for part in flat]
    return [total.reshape(part.shape[1:]) for total, part in zip(sums, rows, strict=True)]


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
