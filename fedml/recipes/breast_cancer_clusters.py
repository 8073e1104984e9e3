"""Breast cancer, as `breast_cancer` reads it, in two clusters, told nothing: `strategy=kmeans`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fedml.recipes.breast_cancer import FEATURES, BreastCancer
from fedml.strategies.kmeans import Centroids


class BreastCancerClusters(BreastCancer):
    """The recipe; scores `closeness`. An output is the squared distance from a cluster's centre."""

    labels = ("first", "second")

    def build(self) -> nn.Module:
        """Return the other's scaling to -1 to 1, and centroids a little below the middle."""
        scale = next(super().build().children())
        return nn.Sequential(scale, Centroids(len(self.labels), len(FEATURES), centre=-0.2))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return half the mean squared distance to the nearest centroid, whatever the labels."""
        return 0.5 * output.min(1).values.mean()

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `closeness`: 1 at a centroid, 1/2 at distance 1 from the nearest."""
        return {"closeness": 1 / (1 + output.min(1).values.clamp(min=0))}
