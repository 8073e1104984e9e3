"""Income above $50,000 a year or not, from 12 answers to a census: logistic regression.

Data: UCI Adult, `adult.data` and `adult.test` (Becker and Kohavi 1996, doi:10.24432/C5XW20,
CC BY 4.0). Copies differ: some have a header, the official test file has a remark in its place
and a dot after each label, and all have blanks around cells. `fnlwgt`, which is about how
the census was drawn, and `education`, which `education-num` says again, are left out; `?` is a
level of its own; a country is the United States, another, or unknown.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows
from simulations.columns import Column, Kind, Measure, Spread, made_up, width

UNKNOWN = "?"
# In the file's order, levels as adult.names lists them; ranges are common sense, chosen
# without a look at any row.
COLUMNS: tuple[Column, ...] = (
    Measure("age", 45.0, 25.0),
    Kind(
        "workclass",
        (
            "Private", "Self-emp-not-inc", "Self-emp-inc", "Federal-gov", "Local-gov",
            "State-gov", "Without-pay", "Never-worked", UNKNOWN,
        ),
    ),
    Measure("education-num", 9.0, 6.0),  # 1, preschool, to 16, doctorate
    Kind(
        "marital-status",
        (
            "Married-civ-spouse", "Divorced", "Never-married", "Separated", "Widowed",
            "Married-spouse-absent", "Married-AF-spouse",
        ),
    ),
    Kind(
        "occupation",
        (
            "Tech-support", "Craft-repair", "Other-service", "Sales", "Exec-managerial",
            "Prof-specialty", "Handlers-cleaners", "Machine-op-inspct", "Adm-clerical",
            "Farming-fishing", "Transport-moving", "Priv-house-serv", "Protective-serv",
            "Armed-Forces", UNKNOWN,
        ),
    ),
    Kind(
        "relationship",
        ("Wife", "Own-child", "Husband", "Not-in-family", "Other-relative", "Unmarried"),
    ),
    Kind("race", ("White", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other", "Black")),
    Kind("sex", ("Female", "Male")),
    Measure("capital-gain", 4.0, 4.0, logarithmic=True),  # $: 0 to 3,000 and far above
    Measure("capital-loss", 4.0, 4.0, logarithmic=True),
    Measure("hours-per-week", 40.0, 20.0),
    Kind("native-country", ("United-States", "other", UNKNOWN)),
)  # fmt: skip
_CELLS = 15
_LEFT_OUT = (2, 3)  # fnlwgt, education


class Adult:
    """The recipe; scores `accuracy`. Output 1 is an income above $50,000."""

    labels = ("at_most_50k", "above_50k")

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
        """Return `accuracy`: 1 where the likelier label is the right one."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Return the rows of `adult.data` or `adult.test`, in any of their forms."""
        try:
            with path.open(newline="", encoding="ascii") as file:
                lines = csv.reader(file, skipinitialspace=True)
                table = [
                    _parse(path, lines.line_num, [cell.strip() for cell in line])
                    for line in lines
                    if any(line) and not _is_remark(line)
                ]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{path}: {error}; is this adult.data or adult.test?") from error
        if not table:
            raise ConfigError(f"{path}: no rows; give at least one")
        values = torch.tensor(table)
        return Rows(values[:, :-1].contiguous(), values[:, -1].long())

    def example(self, rows: int) -> Tensor:
        """Return made-up people, drawn evenly from the public ranges and levels."""
        return made_up(COLUMNS, rows)


def _is_remark(line: list[str]) -> bool:
    """True for the header and for the official test file's first line."""
    return line[0].startswith("|") or line[:2] == ["age", "workclass"]


def _parse(path: Path, number: int, cells: list[str]) -> list[float]:
    """Return a row's 12 numbers and its label."""
    where = f"{path}, line {number}"
    if len(cells) != _CELLS:
        raise ConfigError(f"{where}: {len(cells)} columns; the files of UCI Adult have {_CELLS}")
    label = cells[-1].removesuffix(".").strip()
    if label not in ("<=50K", ">50K"):
        raise ConfigError(f"{where}: label {cells[-1]!r}; it is <=50K or >50K")
    kept = [cell for place, cell in enumerate(cells[:-1]) if place not in _LEFT_OUT]
    if kept[-1] not in ("United-States", UNKNOWN):
        kept[-1] = "other"
    try:
        values = [column.number(cell) for column, cell in zip(COLUMNS, kept, strict=True)]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return [*values, float(label == ">50K")]
