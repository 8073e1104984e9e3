"""Breast cancer, as `breast_cancer` reads it, by a forest of boosted trees: `strategy=xgboost`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from fedml.recipes.breast_cancer import FEATURES, BreastCancer
from fedml.strategies import Forest


class BreastCancerTrees(BreastCancer):
    """The recipe; scores `accuracy`. Its one output is the logit of malignant."""

    labels: tuple[str, ...] = ("malignant",)  # type: ignore[assignment]  # one is enough

    def build(self) -> nn.Module:
        """Return a forest of raw measures, which needs no scaling, with nothing grown."""
        return Forest(len(FEATURES), trees=20, depth=3, bins=64)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean logistic loss."""
        loss: Tensor = functional.binary_cross_entropy_with_logits(
            output[:, 0], target.to(output.dtype)
        )
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`: 1 where the likelier label is the right one."""
        return {"accuracy": ((output[:, 0] > 0) == (target > 0)).float()}
