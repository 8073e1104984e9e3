"""Adult's people, dealt out by workclass: nine offices of 7 to 22,696 people.

Nobody's data is split like this; workclass serves because its shares of high incomes run from 0
to one half, and two of its sites have seen but one label. The official test rows of a workclass
are what its site holds out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from simulations.adult.recipe import LEVELS, WORKCLASS, workclasses
from simulations.download import Source, find

_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult"
TRAIN = Source(
    "adult/adult.data",
    f"{_UCI}/adult.data",
    (
        "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
        "bfa781e36598918535d49f2c199ced8e4fa0f78abda99337b00a37df479c166a",  # with a header line
    ),
)
TEST = Source(
    "adult/adult.test",
    f"{_UCI}/adult.test",
    (
        "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
        "7200d2ccc5660b8e61c7f138fca2682a6450f822478dd5f0cdeb707cb055f481",  # header, no dots
    ),
)


@dataclass(frozen=True)
class Workclasses:
    """One site for each workclass, `unknown` for who did not tell; nothing about it is random."""

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Deal out all rows; `data` is not needed."""
        train, test = (recipe.read(find(source)) for source in (TRAIN, TEST))
        return {
            SiteId("unknown" if level == "?" else level.lower()): Holding(
                _of(train, code), _of(test, code)
            )
            for code, level in enumerate(LEVELS[WORKCLASS])
        }


def _of(rows: Rows, code: int) -> Rows:
    return rows.take(torch.nonzero(workclasses(rows) == code)[:, 0])
