"""Federated k-means: Lloyd 1982, Least squares quantization in PCM, doi:10.1109/TIT.1982.1056489.

Rows belong to their nearest centroid; each centroid c_j then goes to the mean of its n_j rows:
    c_j <- c_j + (sum over its rows of x - c_j) / n_j,
both sums over all sites, so this is Lloyd's algorithm on the pooled rows, whoever holds which. A
centroid without rows stays.

The recipe says how far a row is from a centroid: its loss is half the mean squared distance to the
nearest. Lloyd's step is Newton's for that loss (Bottou and Bengio 1995, Convergence Properties of
the K-Means Algorithms): minus its gradient is the sum above over all n rows, its second
derivatives are n_j / n. So sites look at nothing but the loss, and the model may scale rows first.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, Sample, ServerState
from fedml.strategies.reducers import WeightedMean

_ALMOST, _ROUNDED = 0.01, 1e-6  # by which a count of rows may be off, and by which part of all


@dataclass(frozen=True)
class KMeans:
    """Lloyd's algorithm on all sites' rows; the run's model starts where the recipe's does.

    `training` is not used: sites measure, they do not descend.
    """

    reducer: Reducer = field(default_factory=WeightedMean)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the centroids."""
        return Brief(state.params, rule="kmeans")

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return each centroid at the mean of its rows."""

        def whole(delta: Tensor, share: Tensor) -> Tensor:
            there = share.double() * total.weight >= 0.5  # a row, or no more than noise of sums
            return torch.where(there, delta / torch.where(there, share, 1.0), 0.0)

        moved = total.delta.zip(total.slots["share"], whole)
        return ServerState(state.params + moved, step=state.step + 1)


class Nearest:
    """Reports, for each centroid, the mean over all rows of those that are nearest to it, from it.

    And in the slot `share`, in each of its elements, which part of all rows these are.
    """

    bounded = True

    def reports(self, brief: Brief) -> frozenset[str]:
        """Return the name of the one slot."""
        return frozenset({"share"})

    def measure(self, brief: Brief, sample: Sample) -> tuple[Params, Slots]:
        """Return (sum of x - c over n, share); raises `ConfigError` if the loss is another kind."""
        params = brief.params
        leaves = {
            dtype: buffer.detach().clone().requires_grad_(dtype.is_floating_point)
            for dtype, buffer in params.buffers.items()
        }
        inner = [leaf for leaf in leaves.values() if leaf.requires_grad]
        loss = sample.loss(Params.over(params.layout, leaves))
        slopes = torch.autograd.grad(loss, inner, create_graph=True)
        if not all(slope.requires_grad for slope in slopes):
            raise _another("its slope is the same everywhere")
        shares = torch.autograd.grad(sum(slope.sum() for slope in slopes), inner)  # type: ignore[arg-type]
        _check_counts(torch.cat(shares).double() * len(sample.y), len(sample.y))

        def shaped(parts: tuple[Tensor, ...], sign: float) -> Params:
            left = iter(parts)
            still = params.zeros().buffers
            found = {d: sign * next(left).detach() if d.is_floating_point else still[d]
                     for d in leaves}  # fmt: skip
            return Params.over(params.layout, found)

        return shaped(slopes, -1.0), {"share": shaped(shares, 1.0)}


def _check_counts(counts: Tensor, rows: int) -> None:
    """Raise `ConfigError` unless these can be how many of the rows are nearest to each centroid."""
    off = float((counts - counts.round()).abs().max())
    low, high = (float(end) for end in counts.aminmax())
    room = _ALMOST + _ROUNDED * rows
    if not (off <= room and -room <= low and 1 - room <= high <= rows + room):
        raise _another(f"of {rows} rows it would count {low:.3g} to {high:.3g} at a centroid")


class Centroids(nn.Module):
    """Squared distances of rows [n, d] from `count` centroids, [n, count].

    Centroids start around `centre`, at a normal distance of deviation `spread` in each direction,
    the same each time.
    """

    def __init__(
        self,
        count: int,
        dimensions: int,
        *,
        centre: float = 0.0,
        spread: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        around = torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed))
        self.centroids = nn.Parameter(centre + spread * around)

    def forward(self, x: Tensor) -> Tensor:
        """Return the squared distances."""
        squares: Tensor = (x[:, None, :] - self.centroids).square().sum(2)
        return squares


def _another(why: str) -> ConfigError:
    return ConfigError(
        f"kmeans needs a recipe whose loss is half the mean squared distance to the nearest "
        f"centroid, and this recipe's is another kind: {why}; see docs/algorithms.md"
    )
