"""Adult dealt out to offices, one for each class of worker; the official test rows score.

Data: UCI Adult (Becker and Kohavi 1996, doi:10.24432/C5XW20, CC BY 4.0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedml.learning.recipe import Recipe, Rows
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from simulations.adult.recipe import COLUMNS, UNKNOWN
from simulations.columns import by_level
from simulations.download import Source, find

_UCI = "https://archive.ics.uci.edu/ml/machine-learning-databases/adult"
# The official file first; then a copy in circulation, the same rows under a header line.
TRAIN = Source(
    "adult/adult.data",
    f"{_UCI}/adult.data",
    (
        "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d",
        "bfa781e36598918535d49f2c199ced8e4fa0f78abda99337b00a37df479c166a",
    ),
)
TEST = Source(
    "adult/adult.test",
    f"{_UCI}/adult.test",
    (
        "a2a9044bc167a35b2361efbabec64e89d69ce82d9790d2980119aac5fd7e9c05",
        "7200d2ccc5660b8e61c7f138fca2682a6450f822478dd5f0cdeb707cb055f481",
    ),
)


@dataclass(frozen=True)
class Offices:
    """Nine offices, of 22,696 rows down to 7; two have no income above $50,000 at all.

    `together` puts all rows into one: what a federation is held against.
    """

    together: bool = False

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Return the offices' rows; `data` is not needed, and nothing is random."""
        train, test = recipe.read(find(TRAIN)), recipe.read(find(TEST))
        if self.together:
            return {SiteId("all"): Holding(train, test)}
        trained, held = (by_level(COLUMNS, "workclass", rows) for rows in (train, test))
        none = Rows(test.x[:0], test.y[:0])
        return {
            SiteId("unknown" if office == UNKNOWN else office.lower()): Holding(
                rows, held.get(office, none)
            )
            for office, rows in trained.items()
        }
