"""Breast cancer, malignant or benign, from 30 measures of a fine needle aspirate.

A linear softmax model, which is logistic regression, after a fixed scaling of each measure.

Data: the Wisconsin Diagnostic Breast Cancer set as scikit-learn ships it (Wolberg, Street and
Mangasarian 1995, CC BY 4.0); a site's file is a CSV with scikit-learn's feature names,
underscores for spaces, and a column `malignant` (1 is malignant) or `target` (0 is malignant,
scikit-learn's own coding).
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

# Least and largest value of each feature: the "Summary Statistics" that scikit-learn prints in
# the dataset's DESCR. These are public constants; no mean, deviation or range of a site's rows
# is ever used, for that would be private.
RANGES: Mapping[str, tuple[float, float]] = {
    "mean_radius": (6.981, 28.11),
    "mean_texture": (9.71, 39.28),
    "mean_perimeter": (43.79, 188.5),
    "mean_area": (143.5, 2501.0),
    "mean_smoothness": (0.053, 0.163),
    "mean_compactness": (0.019, 0.345),
    "mean_concavity": (0.0, 0.427),
    "mean_concave_points": (0.0, 0.201),
    "mean_symmetry": (0.106, 0.304),
    "mean_fractal_dimension": (0.05, 0.097),
    "radius_error": (0.112, 2.873),
    "texture_error": (0.36, 4.885),
    "perimeter_error": (0.757, 21.98),
    "area_error": (6.802, 542.2),
    "smoothness_error": (0.002, 0.031),
    "compactness_error": (0.002, 0.135),
    "concavity_error": (0.0, 0.396),
    "concave_points_error": (0.0, 0.053),
    "symmetry_error": (0.008, 0.079),
    "fractal_dimension_error": (0.001, 0.03),
    "worst_radius": (7.93, 36.04),
    "worst_texture": (12.02, 49.54),
    "worst_perimeter": (50.41, 251.2),
    "worst_area": (185.2, 4254.0),
    "worst_smoothness": (0.071, 0.223),
    "worst_compactness": (0.027, 1.058),
    "worst_concavity": (0.0, 1.252),
    "worst_concave_points": (0.0, 0.291),
    "worst_symmetry": (0.156, 0.664),
    "worst_fractal_dimension": (0.055, 0.208),
}
FEATURES = tuple(RANGES)


class BreastCancer:
    """The recipe; scores `accuracy`. Output 1 is malignant."""

    labels = ("benign", "malignant")

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
        """Return the rows of a CSV file, whatever the order of its columns."""
        try:
            with path.open(newline="") as file:
                lines = csv.reader(file)
                header = [name.strip() for name in next(lines, [])]
                places, label, inverted = _columns(path, header)
                table = [
                    _parse(path, lines.line_num, line, [*places, label]) for line in lines if line
                ]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{path}: {error}; is this the CSV file of the dataset?") from error
        if not table:
            raise ConfigError(f"{path}: a header and no rows; give at least one")
        values = torch.tensor(table, dtype=torch.float64)
        y = values[:, -1].long()
        return Rows(values[:, :-1].float(), 1 - y if inverted else y)

    def example(self, rows: int) -> Tensor:
        """Return rows drawn evenly from the public ranges."""
        low, high = torch.tensor(list(RANGES.values())).T
        generator = torch.Generator().manual_seed(0)
        x: Tensor = low + (high - low) * torch.rand(rows, len(FEATURES), generator=generator)
        return x


class _Scale(nn.Module):
    """Brings each measure into [-1, 1]: a fixed monotone curve over its public range.

    Sizes and roughnesses have long upper tails, which a curve thins out: the logarithm where
    the least value is above 0, else the square root. Values outside the range are held at its
    ends.
    """

    low: Tensor
    high: Tensor
    rooted: Tensor
    start: Tensor
    span: Tensor

    def __init__(self) -> None:
        super().__init__()
        low, high = torch.tensor(list(RANGES.values())).T
        rooted = low == 0
        self.register_buffer("low", low.clone(), persistent=False)  # constants do not travel
        self.register_buffer("high", high.clone(), persistent=False)
        self.register_buffer("rooted", rooted, persistent=False)
        self.register_buffer("start", torch.where(rooted, 1.0, low), persistent=False)
        span = (high / torch.where(rooted, 1.0, low)).log()
        self.register_buffer("span", torch.where(rooted, 1.0, span), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        held = torch.minimum(torch.maximum(x, self.low), self.high)
        logs = (torch.where(self.rooted, self.start, held) / self.start).log() / self.span
        share: Tensor = torch.where(self.rooted, (held / self.high).sqrt(), logs)
        return share * 2.0 - 1.0


def _columns(path: Path, header: list[str]) -> tuple[list[int], int, bool]:
    """Return the features' columns, the label's, and whether 0 means malignant there."""
    missing = [name for name in FEATURES if name not in header]
    if missing:
        raise ConfigError(
            f"{path}: no column {', '.join(missing[:3])}"
            f"{' and others' if len(missing) > 3 else ''}; the header must name all 30 features"
        )
    if ("malignant" in header) == ("target" in header):
        raise ConfigError(f"{path}: needs one column 'malignant' or 'target', and not both")
    label = "malignant" if "malignant" in header else "target"
    return [header.index(name) for name in FEATURES], header.index(label), label == "target"


def _parse(path: Path, number: int, line: list[str], places: list[int]) -> list[float]:
    try:
        values = [float(line[place]) for place in places]
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{path}, line {number}: {error}; every cell is a number") from error
    if not all(map(math.isfinite, values)):
        raise ConfigError(f"{path}, line {number}: NaN or infinity; leave the row out")
    if values[-1] not in (0.0, 1.0):
        raise ConfigError(f"{path}, line {number}: label {values[-1]:g}; it is 0 or 1")
    return values
