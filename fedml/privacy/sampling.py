"""Poisson sampling: who joins a step is private, how likely each row joins is public."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedml.errors import ConfigError
from fedml.privacy.noise import SecureNoise


@dataclass(frozen=True)
class PoissonSampler:
    """Takes each of `rows` rows into a step with `probability`, independently of all else.

    The accounting of `SampledGaussian` holds for this way of sampling and no other: not for
    shuffled batches of fixed size. A sample may be empty; the step is then noise alone.
    """

    rows: int
    probability: float

    def __post_init__(self) -> None:
        if self.rows < 0 or not 0 < self.probability <= 1:
            raise ConfigError(
                f"sampling {self.rows} rows with probability {self.probability}: "
                "rows is 0 or more, 0 < probability <= 1"
            )

    def sample(self, noise: SecureNoise) -> Tensor:
        """Return the indices of one step's rows, in ascending order."""
        if self.probability == 1:
            return torch.arange(self.rows)
        return noise.pick(self.rows, self.probability)
