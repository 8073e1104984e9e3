"""A forest of complete binary trees as a model: tensors of fixed size, and a forward by gathers.

It is a model like any other: it travels, is scored, becomes ONNX and is served. `strategy=xgboost`
grows it, see `xgboost.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedml.errors import ConfigError
from fedml.params import Params

Codes = NDArray[np.int64]

DEEPEST = 10  # levels; a histogram of the last one has 2^9 nodes
_PARTS = ("base", "cuts", "feature", "leaf", "threshold")


class Forest(nn.Module):
    """`trees` rounds of trees of `depth` levels over raw features, for each output one a round.

    Output k of a row is `base` plus the sum of its leaves in the k-th trees. A node sends a row
    to the right if its feature is at least the threshold. A node whose feature is -1 has no
    split, and the same leaf on both sides. `cuts` are where features may be split, of each
    feature in ascending order: the least values of all bins but the first. They start where all
    of a float's values would be in equal parts, and `sketch` rounds move them to the rows.
    """

    def __init__(
        self, features: int, *, outputs: int = 1, trees: int = 100, depth: int = 6, bins: int = 256
    ) -> None:
        super().__init__()
        least = {"features": features, "outputs": outputs, "trees": trees, "depth": depth}
        for name, value in least.items():
            if value < 1:
                raise ConfigError(f"a forest with {name} {value}: 1 or more")
        if depth > DEEPEST or not 2 <= bins <= 1024:
            raise ConfigError(
                f"a forest of depth {depth} with {bins} bins: use a depth of 1 to {DEEPEST}, and "
                "2 to 1024 bins"
            )
        nodes, still = 2**depth - 1, {"requires_grad": False}
        edges = np.linspace(-_MOST, _MOST, bins + 1)[1:-1].astype(np.int64)
        cuts = torch.from_numpy(values(np.tile(edges, (features, 1))))
        self.cuts = nn.Parameter(cuts, **still)
        self.feature = nn.Parameter(torch.full((trees, outputs, nodes), -1), **still)
        self.threshold = nn.Parameter(torch.zeros(trees, outputs, nodes), **still)
        self.leaf = nn.Parameter(torch.zeros(trees, outputs, nodes + 1))
        self.base = nn.Parameter(torch.zeros(outputs), **still)

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, outputs], of rows of `features` numbers in whatever shape."""
        return self.base + leaves(self.feature, self.threshold, self.leaf, x)


def places(feature: Tensor, threshold: Tensor, x: Tensor, levels: int) -> Tensor:
    """Return [n, ...]: at which node, counted in its level, rows stand after `levels` levels.

    `feature` and `threshold` are [..., nodes].
    """
    rows = x.flatten(1).float()
    shape, nodes = feature.shape[:-1], feature.shape[-1]
    features, thresholds = feature.reshape(-1, nodes).clamp(min=0), threshold.reshape(-1, nodes)
    trees = torch.arange(len(features), device=x.device)[None, :]
    node = torch.zeros_like(rows[:, :1], dtype=torch.int64) + torch.zeros_like(trees)
    for level in range(levels):
        here = slice(2**level - 1, 2 ** (level + 1) - 1)
        at = node + trees * 2**level
        asked, least = (_at(table[:, here], at) for table in (features, thresholds))
        node = 2 * node + (rows.gather(1, asked) >= least)
    found: Tensor = node.unflatten(1, shape)  # no size of a batch, which an export would fix
    return found


def _at(table: Tensor, places: Tensor) -> Tensor:
    """Return the table's elements at `places`, by far the quickest way on a CPU."""
    return table.reshape(-1).index_select(0, places.flatten()).reshape_as(places)


def leaves(feature: Tensor, threshold: Tensor, leaf: Tensor, x: Tensor) -> Tensor:
    """Return [n, outputs], the sums over all trees of the leaves that rows come to."""
    depth = leaf.shape[-1].bit_length() - 1
    place = places(feature, threshold, x, depth).flatten(1)
    first = torch.arange(place.shape[1], device=x.device)[None, :] * leaf.shape[-1]
    found: Tensor = _at(leaf, first + place).unflatten(1, leaf.shape[:-1]).sum(1)
    return found


def check_forest(params: Params) -> None:
    """Raise `ConfigError` unless `params` are a forest's, and none of its trees is grown."""
    if tuple(sorted(params)) != _PARTS:
        raise ConfigError(
            f"xgboost grows a Forest, this model has {', '.join(sorted(params)[:5]) or 'nothing'}: "
            "let the recipe build a fedml.strategies.Forest, or use strategy=fedavg"
        )
    if grown := int((params["feature"] >= 0).any(2).any(1).sum()):
        raise ConfigError(
            f"{grown} trees of this forest are grown already, and xgboost starts with none: set "
            "parent to 0"
        )


# --- floats in their order, as whole numbers ---------------------------------------------------


def codes(numbers: NDArray[np.float32]) -> Codes:
    """Return whole numbers that are in the order of `numbers`, next ones for next floats."""
    bits = numbers.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(2**31) - bits, bits)


def values(wholes: Codes) -> NDArray[np.float32]:
    """Return the floats that `codes` made `wholes` of."""
    bits = np.where(wholes < 0, -(2**31) - wholes, wholes).astype(np.int32)
    found: NDArray[np.float32] = bits.view(np.float32)
    return found


_MOST = int(codes(np.array([np.finfo(np.float32).max], np.float32))[0])


def refined(
    cuts: NDArray[np.float32], counts: NDArray[np.int64], *, last: bool = False
) -> NDArray[np.float32]:
    """Return a feature's cuts, as many as before, where they part rows better.

    `counts` has a number for each bin. What parts bins with rows in them stays, where that takes
    no more than three cuts of four, or at `last` all; the others split bins by their rows and, as
    much, by whether there are any. Else what parts groups of about as many rows stays, in which a
    bin with many, maybe of one value, is alone; and the others split bins by their rows beyond a
    fair share, up to three. So, if repeated, a few distinct values come to stand alone, and of
    many no bin has much more than two fair shares.
    """
    edges = np.concatenate(([-_MOST], codes(cuts), [_MOST + 1]))
    there, size = counts > 0, len(cuts)
    if not there.any():
        return cuts
    lower, upper = edges[1:-1][there[1:]], edges[1:-1][there[:-1] & ~there[1:]]
    most = size if last else 3 * size // 4
    mass = counts / counts.sum()
    if len(kept := np.union1d(lower, upper)) <= most or len(kept := lower) <= most:
        mass = mass + there / there.sum()
    else:
        kept = _groups(edges, counts, most)
        mass = np.clip(mass - 1 / size, 0.0, 3 / size) + mass / size
    heights = np.concatenate(([0.0], np.cumsum(mass)))
    rest = size - len(kept)
    wanted = np.arange(1, rest + 1) / (rest + 1) * heights[-1]
    more = np.ceil(np.interp(wanted, heights, edges)).astype(np.int64)
    return values(np.sort(np.concatenate((kept, more))))


def _groups(edges: Codes, counts: NDArray[np.int64], most: int) -> Codes:
    """Return at most `most` edges between groups of bins, by the least limit of a group's rows.

    A group has no more rows than the limit, or it is one bin.
    """
    low, high, found = 0, int(counts.sum()), np.empty(0, np.int64)
    while low < high:
        limit, held, starts = (low + high) // 2, 0, []
        for place in counts.nonzero()[0]:
            if held and held + counts[place] > limit:
                starts.append(edges[place])
                held = 0
            held += counts[place]
        if len(starts) <= most:
            high, found = limit, np.array(starts, np.int64)
        else:
            low = limit + 1
    return found
