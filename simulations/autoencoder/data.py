"""Clinics that have filed healthy rows only, and are to notice the first malignant one.

Rows: breast cancer, as it comes with scikit-learn. Benign rows are dealt out evenly; a part of
each clinic's is held out together with as many malignant rows, none of which is trained on.
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
from fedml.simulation.population import Data, ShippedData


@dataclass(frozen=True)
class Clinics:
    """`sites` clinics; the share `held_out` of each one's benign rows is scored."""

    sites: int = 5
    seed: int = 0
    held_out: float = 0.3

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal out the rows; `data` is not needed."""
        rows = ShippedData("breast_cancer").rows(recipe)
        random = np.random.default_rng(self.seed)
        kinds = (random.permutation(np.flatnonzero(rows.y.numpy() == k)) for k in (0, 1))
        benign, malignant = (np.array_split(kind, max(self.sites, 1)) for kind in kinds)
        if self.sites < 1 or not 0 < self.held_out < 1 or len(benign[-1]) * self.held_out < 1:
            raise ConfigError(
                f"{self.sites} clinics holding out {self.held_out}: each needs benign rows to "
                "train on and to score with; there are 357"
            )
        dealt = {}
        for number, (healthy, ill) in enumerate(zip(benign, malignant, strict=True)):
            kept = round(len(healthy) * self.held_out)
            scored = np.concatenate([healthy[:kept], ill[:kept]])
            parts = (torch.from_numpy(part) for part in (healthy[kept:], scored))
            dealt[SiteId(f"clinic-{number}")] = Holding(*(rows.take(part) for part in parts))
        return dealt
