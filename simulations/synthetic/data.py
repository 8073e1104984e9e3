"""Rows drawn as Li et al. 2020 do, arXiv:1812.06127, section 5.1; there is nothing to download.

Site k has int(lognormal(4, 2)) + 50 rows, labelled by a model of its own,
    y = argmax softmax(W x + b),  W_k, b_k ~ N(u_k, 1),    u_k ~ N(0, alpha)
    x ~ N(v_k, diag(j^-1.2)),     v_k ~ N(B_k, 1),         B_k ~ N(0, beta)
where alpha and beta are standard deviations, as in the authors' code. alpha tells how unlike the
sites' models are, beta how unlike their rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data

DIMENSIONS, CLASSES = 60, 10


@dataclass(frozen=True)
class Synthetic:
    """`sites` sites; a tenth of each one's rows is held out."""

    alpha: float = 1.0
    beta: float = 1.0
    sites: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.alpha < math.inf and 0 <= self.beta < math.inf and self.sites >= 1):
            raise ConfigError(
                f"synthetic({self.alpha}, {self.beta}) of {self.sites} sites: alpha and beta are "
                "standard deviations, 0 or more, and there is at least one site"
            )

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Draw each site's rows; `data` is not needed."""
        random = np.random.RandomState(self.seed)  # in the order of the authors' code, with theirs
        sizes = random.lognormal(4, 2, self.sites).astype(int) + 50
        u = random.normal(0, self.alpha, self.sites)
        b = random.normal(0, self.beta, self.sites)
        centres = [random.normal(b[k], 1, DIMENSIONS) for k in range(self.sites)]
        width = len(str(self.sites - 1))
        return {
            SiteId(f"site-{k:0{width}d}"): _site(random, int(sizes[k]), u[k], centres[k])
            for k in range(self.sites)
        }


def _site(
    random: np.random.RandomState, size: int, u: float, centre: np.typing.NDArray[np.float64]
) -> Holding:
    weights = random.normal(u, 1, (DIMENSIONS, CLASSES))
    intercepts = random.normal(u, 1, CLASSES)
    variances = np.arange(1, DIMENSIONS + 1) ** -1.2
    x = random.multivariate_normal(centre, np.diag(variances), size)
    y = (x @ weights + intercepts).argmax(axis=1)
    rows = Rows(torch.from_numpy(x).float(), torch.from_numpy(y).long())
    kept = int(0.9 * size)
    return Holding(rows.take(range(kept)), rows.take(range(kept, size)))
