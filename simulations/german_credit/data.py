"""German credit's 1000 loans, dealt out by purpose: ten offices of 9 to 280 loans.

Nobody's data is split like this; purpose serves because it skews amounts, lengths and defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedml.learning.recipe import Recipe
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from simulations.download import Source, find
from simulations.german_credit.recipe import LEVELS, PURPOSE, purposes

SOURCE = Source(
    "german_credit/german.data",
    "https://archive.ics.uci.edu/ml/machine-learning-databases/statlog/german/german.data",
    ("b21f3d81db8071257d5ff1deaeba1fd4303b62712e6fcc9715c7a86202cb5871",),
)
NAMES = {
    "A40": "new-car",
    "A41": "used-car",
    "A42": "furniture",
    "A43": "television",
    "A44": "appliances",
    "A45": "repairs",
    "A46": "education",
    "A48": "retraining",
    "A49": "business",
    "A410": "others",
}  # A47, holidays, was never given


@dataclass(frozen=True)
class Purposes:
    """One site for each purpose; the share `held_out` of its loans, drawn at random, scores."""

    seed: int = 0
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal out all loans; `data` is not needed."""
        rows = recipe.read(find(SOURCE))
        codes = purposes(rows).numpy()
        random = np.random.default_rng(self.seed)
        dealt = {}
        for code, name in NAMES.items():
            mine = random.permutation(np.flatnonzero(codes == LEVELS[PURPOSE].index(code)))
            kept = round(len(mine) * self.held_out)
            parts = (torch.from_numpy(np.sort(part)) for part in (mine[kept:], mine[:kept]))
            dealt[SiteId(name)] = Holding(*(rows.take(part) for part in parts))
        return dealt
