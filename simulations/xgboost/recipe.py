"""Income above 50,000 dollars or not, as `simulations.adult` reads it, by boosted trees."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional

from fedml.strategies import Forest
from simulations.adult.recipe import Adult


class AdultTrees(Adult):
    """The recipe; scores `accuracy`. Its one output is the logit of an income above 50,000."""

    labels: tuple[str, ...] = ("above_50k",)  # type: ignore[assignment]  # one is enough

    def build(self) -> nn.Module:
        """Return a forest of raw columns, with nothing grown."""
        return Forest(self.example(1).shape[1], trees=50, depth=5, bins=64)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean logistic loss."""
        loss: Tensor = functional.binary_cross_entropy_with_logits(
            output[:, 0], target.to(output.dtype)
        )
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`: 1 where the likelier label is the right one."""
        return {"accuracy": ((output[:, 0] > 0) == (target > 0)).float()}
