"""MNIST dealt out as McMahan et al. 2017 do, arXiv:1602.05629, section 3.

IID: shuffled, equal parts. Non-IID: sorted by digit, cut into shards of equal size, and each site
gets `shards` of them at random, so that with two most sites know two digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from simulations.mnist import test_rows, training_rows


@dataclass(frozen=True)
class Mnist:
    """`sites` sites of equal size; `shards` 0 is IID.

    The official test rows are dealt out as what the sites hold out, so that the mean score over
    all of those is the score on the official test set.
    """

    sites: int = 100
    shards: int = 0
    seed: int = 0

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal out all rows; `data` is not needed."""
        train, test = training_rows(), test_rows()
        parts = self.sites * max(self.shards, 1)
        if self.sites < 1 or self.shards < 0 or parts > len(train) or self.sites > len(test):
            raise ConfigError(
                f"{self.sites} sites of {self.shards} shards: MNIST has {len(train)} rows to "
                f"train on and {len(test)} to test with; lower them"
            )
        random = np.random.default_rng(self.seed)
        if self.shards:
            heaps = np.array_split(np.argsort(train.y.numpy(), kind="stable"), parts)
            order = random.permutation(parts).reshape(self.sites, self.shards)
            mine = [np.concatenate([heaps[k] for k in row]) for row in order]
        else:
            mine = np.array_split(random.permutation(len(train)), self.sites)
        tests = np.array_split(np.arange(len(test)), self.sites)
        width = len(str(self.sites - 1))
        return {
            SiteId(f"site-{k:0{width}d}"): Holding(
                train.take(torch.from_numpy(mine[k])), test.take(torch.from_numpy(tests[k]))
            )
            for k in range(self.sites)
        }
