"""The table in an experiment's README: what to run, what to read off it, what must come out.

The README is the one place where expected figures are written. A table's line is

    | `strategy=fedavg training.lr=0.01` | accuracy | 42-46 | 0.741 ± 0.004 | 0.70 to 0.75 |

with Hydra overrides, a figure (see `figures`), seeds, what was measured when the line was
written (mean ± sample standard deviation over seeds), and what the mean must be.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedml.errors import ConfigError

HOME = Path(__file__).parent
HEADER = "| setting | figure | seeds | measured | must be |"

_RANGE = re.compile(r"(?P<least>\S+) to (?P<most>\S+)")
_LEAST = re.compile(r"at least (?P<least>\S+)")
_MOST = re.compile(r"at most (?P<most>\S+)")


@dataclass(frozen=True)
class Line:
    """One line of a table; `number` is its place in the file."""

    number: int
    overrides: tuple[str, ...]
    figure: str
    seeds: tuple[int, ...]
    measured: str
    must_be: str

    def bounds(self) -> tuple[float, float]:
        """Return what the mean over seeds must lie between, ends included."""
        for pattern in (_RANGE, _LEAST, _MOST):
            if found := pattern.fullmatch(self.must_be):
                ends = {"least": "-inf", "most": "inf", **found.groupdict()}
                return float(ends["least"]), float(ends["most"])
        raise ConfigError(f"{self.must_be!r}: write 'a to b', 'at least a' or 'at most b'")

    def accepts(self, values: Sequence[float]) -> bool:
        """Return whether the mean of `values`, one a seed, is what it must be."""
        least, most = self.bounds()
        return least <= statistics.fmean(values) <= most

    def row(self, measured: str) -> str:
        """Return the line as the README has it, with `measured` in its column."""
        seeds = f"{self.seeds[0]}-{self.seeds[-1]}" if len(self.seeds) > 1 else f"{self.seeds[0]}"
        setting = f"`{' '.join(self.overrides)}`"
        return f"| {setting} | {self.figure} | {seeds} | {measured} | {self.must_be} |"


def experiments() -> tuple[str, ...]:
    """Return the names of all experiments."""
    return tuple(sorted(path.parent.name for path in HOME.glob("*/README.md")))


def readme(experiment: str) -> Path:
    """Return the experiment's README; raises `ConfigError` if there is no such experiment."""
    if experiment not in experiments():
        raise ConfigError(f"no experiment {experiment!r}; there are {', '.join(experiments())}")
    return HOME / experiment / "README.md"


def lines(experiment: str) -> tuple[Line, ...]:
    """Return the lines of the experiment's table; raises `ConfigError` with path and line."""
    path = readme(experiment)
    found = tuple(_parse(path))
    if not found:
        raise ConfigError(f"{path}: no table under the header {HEADER}")
    return found


def write(experiment: str, measured: dict[Line, str]) -> None:
    """Put what was measured into the README's table."""
    path = readme(experiment)
    text = path.read_text().splitlines()
    for line, value in measured.items():
        text[line.number] = line.row(value)
    path.write_text("\n".join(text) + "\n")


def show(values: Sequence[float]) -> str:
    """Return mean ± sample standard deviation, or the one value."""
    mean = statistics.fmean(values)
    shown = _number(mean)
    return f"{shown} ± {_number(statistics.stdev(values))}" if len(values) > 1 else shown


def _number(value: float) -> str:
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _parse(path: Path) -> Iterator[Line]:
    inside = False
    for number, text in enumerate(path.read_text().splitlines()):
        if text.strip() == HEADER:
            inside = True
        elif inside and not text.startswith("|"):
            inside = False
        elif inside and not text.startswith("|---"):
            yield _line(f"{path}, line {number + 1}", number, text)


def _line(where: str, number: int, text: str) -> Line:
    cells = [cell.strip() for cell in text.strip().strip("|").split("|")]
    try:
        setting, figure, seeds, measured, must_be = cells
        first, _, last = seeds.partition("-")
        many = tuple(range(int(first), int(last or first) + 1))
        line = Line(number, tuple(setting.strip("`").split()), figure, many, measured, must_be)
        line.bounds()
    except (ValueError, ConfigError) as error:
        raise ConfigError(f"{where}: {error}") from error
    return line
