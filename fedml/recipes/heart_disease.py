"""Heart disease, absent or present, from 13 features of 4 hospitals' raw files.

Logistic regression as a linear softmax model, after a fixed scaling by clinical ranges.

Data: UCI Heart Disease, `processed.*.data` (Janosi, Steinbrunn, Pfisterer and Detrano 1989,
CC BY 4.0): 14 columns without a header, `?` where a value is missing. Rows are prepared as
FLamby's Fed-Heart-Disease does (du Terrail et al. 2022, arXiv:2210.04620): the columns slope, ca
and thal, which most hospitals lack, are dropped, then each row with a missing value; chest pain
(1-4) and resting ECG (0-2) become one column for each level but the first.

A serum cholesterol of 0 means that it was not measured, at all of one hospital. The model, not
the file, puts the public constant `CHOLESTEROL` in its place, so that served rows get it too.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows

# Each feature, in the model's order, with a centre and a half-width: common clinical ranges of
# adults, chosen without a look at any row.
SCALES: Mapping[str, tuple[float, float]] = {
    "age": (55.0, 20.0),  # years: 35 to 75
    "sex": (0.5, 0.5),  # 1 is male
    "resting_blood_pressure": (130.0, 40.0),  # mm Hg: 90 to 170
    "cholesterol": (220.0, 100.0),  # mg/dl: 120 to 320
    "fasting_blood_sugar": (0.5, 0.5),  # 1 is above 120 mg/dl
    "maximum_heart_rate": (140.0, 50.0),  # beats a minute: 90 to 190
    "exercise_angina": (0.5, 0.5),  # 1 is yes
    "st_depression": (1.0, 2.0),  # mm of the ECG after exercise: -1 to 3
    "chest_pain_atypical": (0.5, 0.5),
    "chest_pain_other": (0.5, 0.5),  # pain that is not angina
    "chest_pain_none": (0.5, 0.5),
    "ecg_st_t_abnormal": (0.5, 0.5),
    "ecg_hypertrophy": (0.5, 0.5),
}
FEATURES = tuple(SCALES)
CHOLESTEROL = 220.0  # mg/dl, about the mean of adults of that time; stands for 0, "not measured"
_COLUMNS = 14
_DROPPED = (10, 11, 12)
_CHEST_PAIN, _ECG = 2, 6  # columns that become one for each level


class HeartDisease:
    """The recipe; scores `accuracy`. Output 1 is disease."""

    labels = ("absent", "present")

    def build(self) -> nn.Module:
        """Return scaling and one linear layer, which starts at zero."""
        linear = nn.Linear(len(FEATURES), len(self.labels))
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
        """Return the complete rows of a raw UCI file, named `.data` or `.csv`."""
        try:
            with path.open(newline="") as file:
                lines = csv.reader(file)
                parsed = [_parse(path, lines.line_num, line) for line in lines if line]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{path}: {error}; is this a processed.*.data file?") from error
        table = [row for row in parsed if row is not None]
        if not table:
            raise ConfigError(f"{path}: {len(parsed)} rows, none of them complete; give one")
        values = torch.tensor(table, dtype=torch.float64)
        return Rows(values[:, :-1].float(), values[:, -1].long())

    def example(self, rows: int) -> Tensor:
        """Return made-up patients: numbers within clinical ranges, one level of each kind."""
        generator = torch.Generator().manual_seed(0)
        centre, half = torch.tensor(list(SCALES.values())).T
        x: Tensor = centre + half * (2 * torch.rand(rows, len(FEATURES), generator=generator) - 1)
        for name in ("sex", "fasting_blood_sugar", "exercise_angina"):
            x[:, FEATURES.index(name)] = x[:, FEATURES.index(name)].round()
        x[:, 8:11] = functional.one_hot(torch.randint(4, (rows,), generator=generator), 4)[:, 1:]
        x[:, 11:] = functional.one_hot(torch.randint(3, (rows,), generator=generator), 3)[:, 1:]
        return x


class _Scale(nn.Module):
    """Centres each feature on its clinical range, unmeasured cholesterol on `CHOLESTEROL`."""

    centre: Tensor
    width: Tensor
    unmeasured: Tensor

    def __init__(self) -> None:
        super().__init__()
        centre, half = torch.tensor(list(SCALES.values())).T
        unmeasured = torch.zeros(len(FEATURES))
        unmeasured[FEATURES.index("cholesterol")] = CHOLESTEROL
        self.register_buffer("centre", centre.clone(), persistent=False)  # they do not travel
        self.register_buffer("width", half.clone(), persistent=False)
        self.register_buffer("unmeasured", unmeasured, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        known: Tensor = torch.where(x == 0, self.unmeasured, x)  # other features keep their 0
        scaled: Tensor = (known - self.centre) / self.width
        return scaled


def _parse(path: Path, number: int, line: list[str]) -> list[float] | None:
    """Return a row's 13 features and its label; None if a value is missing."""
    if len(line) != _COLUMNS:
        raise ConfigError(f"{path}, line {number}: {len(line)} columns; the UCI files have 14")
    kept = [cell.strip() for place, cell in enumerate(line) if place not in _DROPPED]
    if "?" in kept:
        return None
    try:
        values = [float(cell) for cell in kept]
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: {error}; use a number or ?") from error
    pain, ecg = values[_CHEST_PAIN], values[_ECG]
    if not all(map(math.isfinite, values)) or pain not in (1, 2, 3, 4) or ecg not in (0, 1, 2):
        raise ConfigError(
            f"{path}, line {number}: chest pain {pain:g} is not 1-4, or resting ECG {ecg:g} not "
            "0-2, or a value is infinite; mend the row or put ? in its place"
        )
    plain = [value for place, value in enumerate(values[:-1]) if place not in (_CHEST_PAIN, _ECG)]
    levels = [float(pain == level) for level in (2, 3, 4)] + [float(ecg == k) for k in (1, 2)]
    return [*plain, *levels, float(values[-1] != 0)]
