"""Federated gradient-boosted trees: XGBoost, Chen and Guestrin 2016, arXiv:1603.02754.

A round grows one level of one tree. Each site takes the first and second derivatives g_i and h_i of
its rows' losses at the trees so far, and reports their sums over the rows in each node, feature
and bin. With G and H the sums over all sites, the server half splits each node where it gains most,
    gain = G_L^2 / (H_L + lambda) + G_R^2 / (H_R + lambda) - G^2 / (H + lambda),
and a leaf weighs -eta * G / (H + lambda). What sites report are sums, so trees are those of the
pooled rows, and secure aggregation may hide each site's part. The first `sketch` rounds count rows
in bins, and move the bins to where rows are.

g_i, h_i and leaves are multiples of 2^-30: float64 adds them up exactly, in whatever order, so that
the trees are the same to the bit however rows are dealt out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import grad, vmap

from fedml.errors import ConfigError
from fedml.params import Layout, Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, Sample, ServerState, check_setting
from fedml.strategies.forest import Forest, check_forest, leaves, places, refined
from fedml.strategies.reducers import WeightedMean

Floats = NDArray[np.float64]

GRAIN = 2.0**-30  # of derivatives and leaves
_LEAST_GAIN = 1e-6  # as in XGBoost: less is rounding
_COUNTING, _DONE = -1, -2  # in the place of a level
_AT_ONCE = 1024  # rows that go down the trees together


@dataclass(frozen=True)
class XGBoost:
    """Grows a `Forest`, level by level; it takes `sketch` + trees * depth rounds, no more.

    Settings mean what they mean in XGBoost: `eta` shrinks a tree, `reg_lambda` is added to the
    second derivatives, a split must gain `gamma`, and each side of it have second derivatives of
    `min_child_weight` in all. `training` is not used: sites count, they do not descend.
    """

    eta: float = 0.3
    reg_lambda: float = 1.0
    gamma: float = 0.0
    min_child_weight: float = 1.0
    sketch: int = 8
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        check_setting("xgboost.eta", self.eta, open_=True)
        for name in ("reg_lambda", "gamma", "min_child_weight", "sketch"):
            check_setting(f"xgboost.{name}", getattr(self, name))

    @staticmethod
    def specimen() -> Params:
        """Return a small model of the kind that it takes."""
        return Params(Forest(2, trees=12, depth=2, bins=32).state_dict())

    def misfits(self, params: Params, rounds: int) -> Iterator[str]:
        """Say that it is no forest to grow, or that the last tree would be left unfinished."""
        try:
            check_forest(params)
        except ConfigError as error:
            yield str(error)
            return
        shape = Shape.of(params)
        whole = self.sketch + shape.trees * shape.depth
        trees, levels = divmod(rounds - self.sketch, shape.depth)
        if rounds < whole and (trees < 1 or levels):
            why = "none grows" if trees < 1 else "a tree is left unfinished"
            yield (
                f"rounds {rounds} with strategy XGBoost: {self.sketch} find bins and each tree "
                f"takes {shape.depth}, so {why}; set rounds={whole} for all {shape.trees} trees of "
                f"this recipe, or to {self.sketch} and {shape.depth} for each that is wanted"
            )

    def start(self, params: Params) -> ServerState:
        """Start from a forest that is not grown; raises `ConfigError` for another model."""
        check_forest(params)
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the forest, and which level of which tree sites are to look at."""
        tree, level = self._place(state)
        shape = Shape.of(state.params)
        sizes = {"outputs": shape.outputs, "features": shape.features, "bins": shape.bins}
        settings = {"tree": tree, "level": level, **sizes}
        return Brief(state.params, "xgboost", {k: float(v) for k, v in settings.items()})

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return the forest with better cuts, or with one level more."""
        tree, level = self._place(state)
        if level == _DONE:
            return replace(state, step=state.step + 1)
        params = state.params.clone()
        if level == _COUNTING:
            counts = summed(total, "counts", 1.0).astype(np.int64)
            cuts = params["cuts"].numpy()
            last = state.step + 1 == self.sketch
            found = [refined(*one, last=last) for one in zip(cuts, counts, strict=True)]
            params["cuts"].copy_(torch.from_numpy(np.stack(found)))
        else:
            self._grow(params, tree, level, summed(total, "sums", GRAIN))
        return ServerState(params, step=state.step + 1)

    def _place(self, state: ServerState) -> tuple[int, int]:
        """Return which tree a round grows, and which level of it."""
        if state.step < self.sketch:
            return 0, _COUNTING
        shape = Shape.of(state.params)
        tree, level = divmod(state.step - self.sketch, shape.depth)
        return (tree, level) if tree < shape.trees else (0, _DONE)

    def _grow(self, params: Params, tree: int, level: int, sums: Floats) -> None:
        """Write one level of a round's trees; `sums` is [2, outputs, nodes, features, bins]."""
        splits = self.splits(sums)
        depth = Shape.of(params).depth
        feature, threshold, leaf = (params[n][tree] for n in ("feature", "threshold", "leaf"))
        width, first, above = 2 ** (depth - level), 2**level - 1, 2**level // 2 - 1
        for output, node in np.ndindex(*splits.feature.shape):
            if level and feature[output, above + node // 2] < 0:
                continue  # it hangs below a leaf
            chosen, start = int(splits.feature[output, node]), node * width
            if chosen < 0:
                leaf[output, start : start + width] = float(splits.weight[output, node])
                continue
            feature[output, first + node] = chosen
            cut = int(splits.cut[output, node])
            threshold[output, first + node] = params["cuts"][chosen, cut]
            if level == depth - 1:
                leaf[output, start : start + 2] = torch.from_numpy(splits.sides[output, node])

    def splits(self, sums: Floats) -> Splits:
        """Return the best split of each node, given [2, outputs, nodes, features, bins] sums."""
        whole = sums[..., 0, :].sum(-1)[..., None, None]  # any feature's bins have all the rows
        left = np.cumsum(sums, -1)[..., :-1]
        right = whole - left
        gain = self._score(left) + self._score(right) - self._score(whole)
        heavy = np.minimum(left[1], right[1]) >= max(self.min_child_weight, GRAIN)
        good = heavy & (gain > _LEAST_GAIN) & (gain >= self.gamma)
        flat = np.where(good, gain, -np.inf).reshape(*gain.shape[:2], -1)
        best = flat.argmax(-1)  # the first of equals
        found = np.isfinite(np.take_along_axis(flat, best[..., None], -1)[..., 0])
        chosen, cut = np.divmod(best, gain.shape[-1])
        sides = [
            np.take_along_axis(side.reshape(*side.shape[:3], -1), best[None, ..., None], -1)[..., 0]
            for side in (left, right)
        ]
        return Splits(
            np.where(found, chosen, -1),
            cut,
            self._weight(whole[..., 0, 0]),
            np.stack([*map(self._weight, sides)], -1),
        )

    def _score(self, sums: Floats) -> Floats:
        under = sums[1] + self.reg_lambda
        gain: Floats = np.divide(sums[0] ** 2, under, out=np.zeros_like(under), where=under > 0)
        return gain

    def _weight(self, sums: Floats) -> NDArray[np.float32]:
        under = sums[1] + self.reg_lambda
        there = (sums[1] > 0) & (sums[1] >= self.min_child_weight)
        weight = np.divide(-self.eta * sums[0], under, out=np.zeros_like(under), where=there)
        return np.asarray(np.rint(weight / GRAIN) * GRAIN, np.float32)


@dataclass(frozen=True)
class Splits:
    """By output and node: the feature to split, -1 for none, which cut, the weight of the node
    as a leaf, and those of the sides [..., 2] of a split.
    """

    feature: NDArray[np.int64]
    cut: NDArray[np.int64]
    weight: NDArray[np.float32]
    sides: NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """The sizes of a forest."""

    trees: int
    outputs: int
    depth: int
    features: int
    bins: int

    @staticmethod
    def of(params: Params) -> Shape:
        """Return those of the forest with these parameters."""
        trees, outputs, most = params["leaf"].shape
        features, cuts = params["cuts"].shape
        return Shape(trees, outputs, most.bit_length() - 1, features, cuts + 1)


class Histograms:
    """Reports, as means over a site's rows, counts by bin, or derivatives by node and bin."""

    bounded = True
    needs_exact_model = True  # rows are counted by its cuts

    def reports(self, brief: Brief) -> frozenset[str]:
        """Return the one slot's name, or none where the forest is grown."""
        return frozenset(self.layouts(brief.settings))

    def layouts(self, settings: Mapping[str, float]) -> Mapping[str, Layout]:
        """Return how the slot is laid out."""
        level = int(settings["level"])
        outputs, *shape = (int(settings[name]) for name in ("outputs", "features", "bins"))
        if level == _DONE:
            return {}
        if level == _COUNTING:
            return {"counts": Layout((("counts", torch.float64, tuple(shape)),))}
        return {"sums": Layout((("sums", torch.float64, (2, outputs, 2**level, *shape)),))}

    def measure(self, brief: Brief, sample: Sample) -> tuple[Params, Slots]:
        """Return (zeros, the slot)."""
        still, shape = brief.params.zeros(), Shape.of(brief.params)
        tree, level = (int(brief.settings[name]) for name in ("tree", "level"))
        if level == _DONE:
            return still, {}
        if not (_COUNTING <= level < shape.depth and 0 <= tree < shape.trees):
            raise ConfigError(f"level {level} of tree {tree}: this forest has no such level")
        x = sample.x.reshape(len(sample.x), -1).float()
        if x.shape[1] != shape.features:
            raise ConfigError(f"{x.shape[1]} features a row, and the forest has {shape.features}")
        bins = torch.searchsorted(brief.params["cuts"], x.T.contiguous(), right=True).T
        if level == _COUNTING:
            ones = torch.ones(len(x), dtype=torch.float64, device=x.device)
            counts = _histogram(bins, torch.zeros_like(bins[:, 0]), ones, shape.bins, 1)
            return still, {"counts": Params({"counts": counts[0] / len(x)})}
        feature, threshold = (brief.params[name][tree] for name in ("feature", "threshold"))
        nodes = places(feature, threshold, x, level).T
        sums = []
        for each in derivatives(sample, _outputs(brief.params, x, tree)):
            pairs = zip(nodes, each.T, strict=True)
            sums.append(torch.stack([_histogram(bins, *p, shape.bins, 2**level) for p in pairs]))
        return still, {"sums": Params({"sums": torch.stack(sums) / len(x)})}


def derivatives(sample: Sample, outputs: Tensor) -> Iterator[Tensor]:
    """Yield the first and the second derivatives [n, outputs] of each row's own loss."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return sample.criterion(output[None], target[None])

    def curvature(output: Tensor, target: Tensor, way: Tensor) -> Tensor:
        row: Tensor = grad(lambda at: (grad(loss)(at, target) * way).sum())(output)
        return row

    ways = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    yield _grained(vmap(grad(loss))(outputs, sample.y))
    along = vmap(vmap(curvature, (None, None, 0)), (0, 0, None))
    yield _grained(along(outputs, sample.y, ways).diagonal(dim1=1, dim2=2))


def _outputs(params: Params, x: Tensor, trees: int) -> Tensor:
    """Return the outputs of the first `trees` rounds of trees, exact in float64."""
    feature, threshold = (params[name][:trees] for name in ("feature", "threshold"))
    leaf, base = params["leaf"][:trees].double(), params["base"].double()
    parts = x.split(_AT_ONCE)
    return torch.cat([base + leaves(feature, threshold, leaf, part) for part in parts])


def _grained(values: Tensor) -> Tensor:
    return (values.detach() / GRAIN).round() * GRAIN


def _histogram(bins: Tensor, node: Tensor, weights: Tensor, size: int, nodes: int) -> Tensor:
    """Return [nodes, features, size], the sums of rows' weights in each bin of each node."""
    features = bins.shape[1]
    first = torch.arange(features, device=bins.device) * size
    place = (bins + first + node[:, None] * (features * size)).reshape(-1)
    heavy = weights[:, None].expand(-1, features).reshape(-1)
    found: Tensor = torch.bincount(place, heavy, minlength=nodes * features * size)
    return found.reshape(nodes, features, size)


def summed(total: Aggregate, slot: str, grain: float) -> Floats:
    """Return the sums over all rows that sites' means stand for, exactly: multiples of `grain`."""
    means: Floats = total.slots[slot][slot].numpy()
    exact: Floats = np.rint(means * (total.weight / grain)) * grain
    return exact
