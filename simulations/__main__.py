"""`python -m simulations NAME`: run an experiment, and hold it against its README's table."""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedml.cli.simulate import simulate
from fedml.errors import ConfigError, FedmlError
from simulations import table
from simulations.figures import figure


def main(argv: Sequence[str]) -> int:
    """Print the table with what was measured; return 1 if a figure is not what it must be."""
    parser = argparse.ArgumentParser(prog="python -m simulations", description=__doc__)
    parser.add_argument("experiment", nargs="?", help="without one: list them")
    parser.add_argument("overrides", nargs="*", help="of every line, such as executor=inline")
    parser.add_argument("--folder", type=Path, default=Path("build/simulations"))
    parser.add_argument("--only", default="", help="lines whose setting contains this text")
    parser.add_argument("--write", action="store_true", help="put the figures into the README")
    options = parser.parse_intermixed_args(argv)
    if options.experiment is None:
        print("\n".join(table.experiments()))
        return 0
    try:
        lines = [
            line
            for line in table.lines(options.experiment)
            if options.only in " ".join(line.overrides)
        ]
        if not lines:
            raise ConfigError(f"--only {options.only!r}: no line of the table has it")
        folder = options.folder / options.experiment
        found = {
            line: _measure(options.experiment, line, options.overrides, folder) for line in lines
        }
    except FedmlError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.write:
        measured = {line: table.show(values) for line, values in found.items()}
        table.write(options.experiment, measured)
    return _compare(found)


def _measure(
    experiment: str, line: table.Line, overrides: Sequence[str], folder: Path
) -> list[float]:
    read = figure(experiment, line.figure)
    values = []
    for seed in line.seeds:
        home = _played(experiment, (*line.overrides, *overrides, f"seed={seed}"), folder)
        values.append(read(home))
        told = f"{line.figure} {values[-1]:.4g}"
        print(f"{experiment} {' '.join(line.overrides)} seed={seed}: {told}", file=sys.stderr)
    return values


_done: dict[tuple[str, ...], Path] = {}  # lines that read two figures off one run share it


def _played(experiment: str, overrides: tuple[str, ...], folder: Path) -> Path:
    """Return the folder of a finished simulation; raises `ConfigError` if it failed."""
    settings = (f"experiment={experiment}", *overrides)
    if settings not in _done:
        home = folder / f"{len(_done):03d}"
        home.mkdir(parents=True, exist_ok=True)
        with (home / "output.txt").open("w") as file, contextlib.redirect_stdout(file):
            status = simulate([*settings, "tracking=none", f"hydra.run.dir={home.as_posix()}"])
        if status:
            raise ConfigError(f"{' '.join(settings)} did not end well; see {home / 'output.txt'}")
        _done[settings] = home
    return _done[settings]


def _compare(found: Mapping[table.Line, list[float]]) -> int:
    print(f"{table.HEADER} |\n|---|---|---|---|---|---|")
    right = True
    for line, values in found.items():
        good = line.accepts(values) and not math.isnan(statistics.fmean(values))
        print(f"{line.row(table.show(values))} {'ok' if good else 'NOT SO'} |")
        right = right and good
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
