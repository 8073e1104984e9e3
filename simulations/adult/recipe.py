"""Income above 50,000 dollars or not, from eleven attributes of a census; logistic regression.

Data: Adult of the UCI repository (Becker and Kohavi 1996, CC BY 4.0): 15 columns. `?` is a level
of its own, for who did not answer is not like who did. Of the columns, `fnlwgt` (how many people
a row stands for), `education` (`education-num` says it) and `native-country` are not used.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows

# Column by column: its levels, or for a number a centre and a half-width that were chosen from
# what it means, without a look at any row.
LEVELS: Mapping[int, tuple[str, ...]] = {
    1: (
        "Private", "Self-emp-not-inc", "Self-emp-inc", "Federal-gov", "Local-gov", "State-gov",
        "Without-pay", "Never-worked", "?",
    ),
    5: (
        "Married-civ-spouse", "Divorced", "Never-married", "Separated", "Widowed",
        "Married-spouse-absent", "Married-AF-spouse",
    ),
    6: (
        "Tech-support", "Craft-repair", "Other-service", "Sales", "Exec-managerial",
        "Prof-specialty", "Handlers-cleaners", "Machine-op-inspct", "Adm-clerical",
        "Farming-fishing", "Transport-moving", "Priv-house-serv", "Protective-serv",
        "Armed-Forces", "?",
    ),
    7: ("Wife", "Own-child", "Husband", "Not-in-family", "Other-relative", "Unmarried"),
    8: ("White", "Asian-Pac-Islander", "Amer-Indian-Eskimo", "Other", "Black"),
    9: ("Female", "Male"),
}  # fmt: skip
SCALES: Mapping[int, tuple[float, float]] = {
    0: (40.0, 20.0),  # age, years
    4: (10.0, 3.0),  # years of education
    10: (0.0, 10.0),  # logarithm of 1 + capital gain
    11: (0.0, 10.0),  # logarithm of 1 + capital loss
    12: (40.0, 12.0),  # hours a week
}
LOGARITHMS = frozenset({10, 11})
WORKCLASS = 1
_COLUMNS = 15
_USED = tuple(sorted({*LEVELS, *SCALES}))
_LABELS = {"<=50K": 0.0, ">50K": 1.0}


class Adult:
    """The recipe; scores `accuracy`. Output 1 is an income above 50,000."""

    labels = ("at_most_50k", "above_50k")

    def build(self) -> nn.Module:
        """Return scaling and one linear layer, which starts at zero."""
        scale = _Scale()
        linear = nn.Linear(len(scale.centre), len(self.labels))
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(scale, linear)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`: 1 where the likelier label is the right one."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Return the rows of `adult.data` or `adult.test`, with or without a header line."""
        try:
            with path.open(newline="") as file:
                table = list(_parsed(path, csv.reader(file, skipinitialspace=True)))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{path}: {error}; is this adult.data?") from error
        if not table:
            raise ConfigError(f"{path}: no rows; is this adult.data?")
        values = torch.tensor(table)
        return Rows(values[:, :-1], values[:, -1].long())

    def example(self, rows: int) -> Tensor:
        """Return made-up people: one level of each kind, numbers within their half-widths."""
        generator = torch.Generator().manual_seed(0)
        parts = []
        for column in _USED:
            if column in LEVELS:
                count = len(LEVELS[column])
                drawn = torch.randint(count, (rows,), generator=generator)
                parts.append(functional.one_hot(drawn, count).float())
            else:
                centre, width = SCALES[column]
                parts.append(centre + width * torch.rand(rows, 1, generator=generator))
        return torch.cat(parts, dim=1)


def workclasses(rows: Rows) -> Tensor:
    """Return each row's workclass, as a place in `LEVELS[WORKCLASS]`."""
    start = sum(_size(column) for column in _USED if column < WORKCLASS)
    return rows.x[:, start : start + _size(WORKCLASS)].argmax(dim=1)


class _Scale(nn.Module):
    """Centres numbers on their public range; columns of levels stay as they are."""

    centre: Tensor
    width: Tensor
    logs: Tensor

    def __init__(self) -> None:
        super().__init__()
        columns = [column for column in _USED for _ in range(_size(column))]
        centre, width = torch.tensor([SCALES.get(column, (0.0, 1.0)) for column in columns]).T
        logs = torch.tensor([column in LOGARITHMS for column in columns])
        self.register_buffer("centre", centre.clone(), persistent=False)  # they do not travel
        self.register_buffer("width", width.clone(), persistent=False)
        self.register_buffer("logs", logs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        known = torch.where(self.logs, x.clamp(min=0.0).log1p(), x)
        scaled: Tensor = (known - self.centre) / self.width
        return scaled


def _size(column: int) -> int:
    """Return how many of the model's inputs a column becomes."""
    return len(LEVELS.get(column, ("",)))


def _parsed(path: Path, lines: Iterator[list[str]]) -> Iterator[list[float]]:
    for number, line in enumerate(lines, 1):
        first = number == 1 and (not line or line[0].startswith("|") or line[0] == "age")
        if line and not first:
            yield _parse(f"{path}, line {number}", [cell.strip() for cell in line])


def _parse(where: str, cells: list[str]) -> list[float]:
    if len(cells) != _COLUMNS:
        raise ConfigError(f"{where}: {len(cells)} columns; adult.data has {_COLUMNS}")
    row: list[float] = []
    for column in _USED:
        cell = cells[column]
        if column in SCALES:
            if not cell.isdigit():
                raise ConfigError(f"{where}: column {column + 1} is {cell!r}, not a number")
            row.append(float(cell))
        elif cell in LEVELS[column]:
            row += [float(cell == level) for level in LEVELS[column]]
        else:
            known = ", ".join(LEVELS[column])
            raise ConfigError(f"{where}: column {column + 1} is {cell!r}, none of {known}")
    label = cells[-1].removesuffix(".")  # the test file's labels end with a dot
    if label not in _LABELS:
        raise ConfigError(f"{where}: label {cells[-1]!r}; it is <=50K or >50K")
    return [*row, _LABELS[label]]
