"""Good or bad credit from 20 attributes of a loan and who asks for it; logistic regression.

Data: Statlog (German Credit Data) of the UCI repository (Hofmann 1994, CC BY 4.0): `german.data`,
21 columns with spaces between them, 7 of them numbers, 13 of them codes, the last one 1 for good
and 2 for bad. A code becomes one column for each level of its attribute, as `german.doc` lists
them; numbers are scaled by public constants in the model's first layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows

# Attribute by attribute: its levels, or for a number a centre and a half-width that were chosen
# from what it means, without a look at any row.
LEVELS: Mapping[int, tuple[str, ...]] = {
    0: ("A11", "A12", "A13", "A14"),  # the current account
    2: ("A30", "A31", "A32", "A33", "A34"),  # credit history
    3: ("A40", "A41", "A42", "A43", "A44", "A45", "A46", "A47", "A48", "A49", "A410"),  # purpose
    5: ("A61", "A62", "A63", "A64", "A65"),  # savings
    6: ("A71", "A72", "A73", "A74", "A75"),  # years in the present job
    8: ("A91", "A92", "A93", "A94", "A95"),  # sex and marital status
    9: ("A101", "A102", "A103"),  # other debtors
    11: ("A121", "A122", "A123", "A124"),  # property
    13: ("A141", "A142", "A143"),  # other instalment plans
    14: ("A151", "A152", "A153"),  # housing
    16: ("A171", "A172", "A173", "A174"),  # job
    18: ("A191", "A192"),  # telephone
    19: ("A201", "A202"),  # foreign worker
}
SCALES: Mapping[int, tuple[float, float]] = {
    1: (24.0, 24.0),  # months
    4: (3000.0, 3000.0),  # amount, Deutsche Mark
    7: (2.5, 1.5),  # instalment as a code for its share of income, 1 to 4
    10: (2.5, 1.5),  # years at the address, as a code 1 to 4
    12: (40.0, 20.0),  # age, years
    15: (2.0, 1.0),  # credits at this bank
    17: (1.5, 0.5),  # dependants
}
PURPOSE = 3
_COLUMNS = 21
_WIDTH = sum(map(len, LEVELS.values())) + len(SCALES)


class GermanCredit:
    """The recipe; scores `accuracy`. Output 1 is bad."""

    labels = ("good", "bad")

    def build(self) -> nn.Module:
        """Return scaling and one linear layer, which starts at zero."""
        linear = nn.Linear(_WIDTH, len(self.labels))
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(_Scale(), linear)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`: 1 where the likelier label is the right one."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Return the rows of a file in the format of `german.data`."""
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}; is this german.data?") from error
        table = [_parse(path, n, line.split()) for n, line in enumerate(lines, 1) if line.strip()]
        if not table:
            raise ConfigError(f"{path}: no rows; is this german.data?")
        values = torch.tensor(table)
        return Rows(values[:, :-1], values[:, -1].long())

    def example(self, rows: int) -> Tensor:
        """Return made-up loans: one level of each attribute, numbers within their half-widths."""
        generator = torch.Generator().manual_seed(0)
        parts = []
        for attribute in range(_COLUMNS - 1):
            if attribute in LEVELS:
                count = len(LEVELS[attribute])
                drawn = torch.randint(count, (rows,), generator=generator)
                parts.append(functional.one_hot(drawn, count).float())
            else:
                centre, half = SCALES[attribute]
                parts.append(centre + half * (2 * torch.rand(rows, 1, generator=generator) - 1))
        return torch.cat(parts, dim=1)


def purposes(rows: Rows) -> Tensor:
    """Return each row's purpose, as a place in `LEVELS[PURPOSE]`."""
    start = sum(_size(attribute) for attribute in range(PURPOSE))
    return rows.x[:, start : start + _size(PURPOSE)].argmax(dim=1)


class _Scale(nn.Module):
    """Centres numbers on their public range; columns of levels stay as they are."""

    centre: Tensor
    width: Tensor

    def __init__(self) -> None:
        super().__init__()
        scales = [SCALES.get(k, (0.0, 1.0)) for k in range(_COLUMNS - 1) for _ in range(_size(k))]
        centre, half = torch.tensor(scales).T
        self.register_buffer("centre", centre.clone(), persistent=False)  # they do not travel
        self.register_buffer("width", half.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = (x - self.centre) / self.width
        return scaled


def _size(attribute: int) -> int:
    """Return how many columns an attribute becomes."""
    return len(LEVELS.get(attribute, ("",)))


def _parse(path: Path, number: int, cells: list[str]) -> list[float]:
    where = f"{path}, line {number}"
    if len(cells) != _COLUMNS:
        raise ConfigError(f"{where}: {len(cells)} columns; german.data has {_COLUMNS}")
    row: list[float] = []
    for attribute, cell in enumerate(cells[:-1]):
        if attribute in SCALES:
            if not cell.isdigit():
                raise ConfigError(f"{where}: attribute {attribute + 1} is {cell!r}, not a number")
            row.append(float(cell))
        elif cell in LEVELS[attribute]:
            row += [float(cell == level) for level in LEVELS[attribute]]
        else:
            known = ", ".join(LEVELS[attribute])
            raise ConfigError(f"{where}: attribute {attribute + 1} is {cell!r}, not of {known}")
    if cells[-1] not in ("1", "2"):
        raise ConfigError(f"{where}: label {cells[-1]!r}; it is 1 (good) or 2 (bad)")
    return [*row, float(cells[-1] == "2")]
