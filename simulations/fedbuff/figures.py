"""The figures of this experiment: virtual time to an accuracy, and what part of FedAvg's that is.

FedAvg's time is that of its training alone, and another's all that passed, scoring with it: so
that the part is never told too small.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from fedml.cli.simulate import simulate
from fedml.errors import ConfigError
from fedml.simulation.results import RESULTS
from simulations.figures import Figure, curve

TARGET = 0.9  # accuracy on the test rows
_LASTING = 60  # rounds within which FedAvg is there, with seconds to spare


def seconds(folder: Path) -> float:
    """Return the virtual seconds until the test rows' accuracy was `TARGET` first."""
    return _seconds(folder, ("train", "evaluate"))


def part(folder: Path) -> float:
    """Return those seconds as a part of FedAvg's, with the same seed, sites and world."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    with tempfile.TemporaryDirectory() as home:
        words = [
            "experiment=fedbuff", "strategy=fedavg", "cohort.quorum=10", f"rounds={_LASTING}",
            f"seed={settings['seed']}", "tracking=none", f"hydra.run.dir={home}",
        ]  # fmt: skip
        with (Path(home) / "output.txt").open("w") as file, contextlib.redirect_stdout(file):
            status = simulate(words)
        if status:
            raise ConfigError(f"FedAvg did not end well, for comparison with {folder}")
        return seconds(folder) / _seconds(Path(home), ("train",))


def _seconds(folder: Path, kinds: tuple[str, ...]) -> float:
    there = [n for n, accuracy in curve(folder, "accuracy").items() if accuracy >= TARGET]
    if not there:
        return math.inf
    columns = ["round", "kind", "virtual_seconds"]
    filters = [("outcome", "=", "total"), ("kind", "in", kinds), ("round", "<=", there[0])]
    lines = pq.read_table(folder / RESULTS, columns=columns, filters=filters).to_pylist()
    return math.fsum(float(line["virtual_seconds"]) for line in lines)


FIGURES: Mapping[str, Figure] = {
    f"virtual seconds to accuracy {TARGET}": seconds,
    "part of FedAvg's virtual time": part,
}
