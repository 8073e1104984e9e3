"""Credit risk, good or bad, from 20 facts about a loan and its taker: logistic regression.

Data: UCI Statlog German Credit, `german.data` (Hofmann 1994, doi:10.24432/C5NC77, CC BY 4.0): 20
columns and a label without a header, parted by blanks; levels are coded as `german.doc` lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows
from simulations.columns import Column, Kind, Measure, Spread, made_up, width


def _kind(name: str, attribute: int, *levels: int) -> Kind:
    return Kind(name, tuple(f"A{attribute}{level}" for level in levels))


# In the file's order; levels as german.doc lists them. Ranges are common sense about consumer
# loans, chosen without a look at any row.
COLUMNS: tuple[Column, ...] = (
    _kind("checking_account", 1, 1, 2, 3, 4),
    Measure("months", 24.0, 24.0),
    _kind("credit_history", 3, 0, 1, 2, 3, 4),
    _kind("purpose", 4, *range(11)),
    Measure("amount", 8.0, 2.0, logarithmic=True),  # DM: 400 to 22,000
    _kind("savings", 6, 1, 2, 3, 4, 5),
    _kind("employed_since", 7, 1, 2, 3, 4, 5),
    Measure("installment_rate", 2.5, 1.5),  # class 1 to 4
    _kind("status_and_sex", 9, 1, 2, 3, 4, 5),
    _kind("other_debtors", 10, 1, 2, 3),
    Measure("residence", 2.5, 1.5),  # class 1 to 4
    _kind("property", 12, 1, 2, 3, 4),
    Measure("age", 45.0, 25.0),
    _kind("other_plans", 14, 1, 2, 3),
    _kind("housing", 15, 1, 2, 3),
    Measure("credits_here", 2.0, 1.0),
    _kind("job", 17, 1, 2, 3, 4),
    Measure("dependants", 1.5, 0.5),
    _kind("telephone", 19, 1, 2),
    _kind("foreign_worker", 20, 1, 2),
)
COST = 5.0  # of a bad risk that is granted, in units of a good one that is refused: german.doc


class GermanCredit:
    """The recipe; output 1 is a bad risk.

    Scores: `accuracy`, and `cost` in fifths: a granted bad risk costs 1, a refused good one 1/5,
    where a loan is refused if its chance to be bad is above 1/6, as that matrix asks for.
    """

    labels = ("good", "bad")

    def build(self) -> nn.Module:
        """Return the spreading of columns and one linear layer, which starts at zero."""
        linear = nn.Linear(width(COLUMNS), len(self.labels))
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(Spread(COLUMNS), linear)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy` and `cost`."""
        bad = target == 1
        refused = output.softmax(dim=1)[:, 1] > 1 / (1 + COST)
        cost = torch.where(bad, (~refused).float(), refused.float() / COST)
        return {"accuracy": (output.argmax(1) == target).float(), "cost": cost}

    def read(self, path: Path) -> Rows:
        """Return the rows of `german.data`, or of a part of it."""
        try:
            lines = path.read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}; is this german.data?") from error
        table = [_parse(path, k, line.split()) for k, line in enumerate(lines, 1) if line.strip()]
        if not table:
            raise ConfigError(f"{path}: no rows; give at least one")
        values = torch.tensor(table)
        return Rows(values[:, :-1].contiguous(), values[:, -1].long())

    def example(self, rows: int) -> Tensor:
        """Return made-up loans, drawn evenly from the public ranges and levels."""
        return made_up(COLUMNS, rows)


def _parse(path: Path, number: int, cells: list[str]) -> list[float]:
    """Return a row's 20 numbers and its label, 1 for bad."""
    where = f"{path}, line {number}"
    if len(cells) != len(COLUMNS) + 1:
        raise ConfigError(f"{where}: {len(cells)} columns; german.data has {len(COLUMNS) + 1}")
    if cells[-1] not in ("1", "2"):
        raise ConfigError(f"{where}: label {cells[-1]!r}; it is 1 (good) or 2 (bad)")
    try:
        values = [column.number(cell) for column, cell in zip(COLUMNS, cells, strict=False)]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return [*values, float(cells[-1] == "2")]
