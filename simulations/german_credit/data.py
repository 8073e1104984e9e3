"""German credit dealt out to a bank's offices, one for each purpose of a loan.

Data: UCI Statlog German Credit (Hofmann 1994, doi:10.24432/C5NC77, CC BY 4.0).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from simulations.columns import by_level
from simulations.download import Source, find
from simulations.german_credit.recipe import COLUMNS

SOURCE = Source(
    "german_credit/german.data",
    "https://archive.ics.uci.edu/ml/machine-learning-databases/statlog/german/german.data",
    ("b21f3d81db8071257d5ff1deaeba1fd4303b62712e6fcc9715c7a86202cb5871",),
)
OFFICES: Mapping[str, str] = {  # as german.doc tells the codes of purposes
    "A40": "new-car",
    "A41": "used-car",
    "A42": "furniture",
    "A43": "television",
    "A44": "appliances",
    "A45": "repairs",
    "A46": "education",
    "A47": "vacation",
    "A48": "retraining",
    "A49": "business",
    "A410": "other",
}


@dataclass(frozen=True)
class Offices:
    """An office for each purpose; `held_out` is the share of its rows, drawn at random, to score.

    `together` puts all offices into one: what a federation is held against.
    """

    seed: int = 0
    held_out: float = 0.2
    together: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"population.held_out {self.held_out}: a share between 0 and 1")

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Return the offices' rows; `data` is not needed."""
        offices = by_level(COLUMNS, "purpose", recipe.read(find(SOURCE)))
        holdings: dict[SiteId, Holding] = {}
        for number, (purpose, rows) in enumerate(offices.items()):
            order = np.random.default_rng([self.seed, number]).permutation(len(rows))
            shuffled = torch.from_numpy(order)
            kept = round(len(rows) * self.held_out)
            holdings[SiteId(OFFICES[purpose])] = Holding(
                rows.take(shuffled[kept:]), rows.take(shuffled[:kept])
            )
        return {SiteId("all"): _join(holdings.values())} if self.together else holdings


def _join(holdings: Iterable[Holding]) -> Holding:
    trains, held = zip(*((one.train, one.held_out) for one in holdings), strict=True)
    return Holding(_stack(trains), _stack(held))


def _stack(parts: Sequence[Rows]) -> Rows:
    return Rows(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
