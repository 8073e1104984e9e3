"""What is read off a finished simulation's folder: a final score, rounds to a target, a mean."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow.parquet as pq
import torch

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe
from fedml.params import read
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.results import MODEL, RESULTS

Figure = Callable[[Path], float]  # from a simulation's output folder to a number

_NEEDED = re.compile(r"rounds to (?P<score>[a-z_]+) (?P<target>0?\.\d+)")
_LATE = re.compile(r"(?P<score>[a-z_]+), mean of the last (?P<count>\d+) scorings")
_FINAL = re.compile(r"(?P<score>[a-z_]+)")


def figure(experiment: str, text: str) -> Figure:
    """Return what reads the figure named `text`: the experiment's own `FIGURES`, or one of

        accuracy                                     of the final model, over all held-out rows
        accuracy, mean of the last 10 scorings
        rounds to accuracy 0.97                      infinity if it was never there

    for any score. Raises `ConfigError` for other texts.
    """
    own = _own(experiment)
    if text in own:
        return own[text]
    if found := _NEEDED.fullmatch(text):
        score, target = found["score"], float(found["target"])
        return lambda folder: _first(curve(folder, score), target)
    if found := _LATE.fullmatch(text):
        score, count = found["score"], int(found["count"])
        return lambda folder: statistics.fmean(list(curve(folder, score).values())[-count:])
    if _FINAL.fullmatch(text):
        return lambda folder: _final(folder, text)
    raise ConfigError(f"{experiment}: no figure {text!r}; see simulations/figures.py")


def curve(folder: Path, score: str) -> Mapping[int, float]:
    """Return `score` by round, of all the rounds after which models were scored."""
    name, table = f"score.{score}", folder / RESULTS
    kept = name in pq.read_schema(table).names
    wanted = ["round", *([name] if kept else [])]
    of_rounds = [("kind", "=", "evaluate"), ("outcome", "=", "total")]
    lines = pq.read_table(table, columns=wanted, filters=of_rounds).to_pylist()
    found = {int(line["round"]): float(line[name]) for line in lines if line.get(name) is not None}
    if not found:
        raise ConfigError(f"{folder}: no score {score!r} was kept; set evaluation.every")
    return found


def percent_right_of(folder: Path, recipe: Recipe, holdings: Mapping[SiteId, Holding]) -> float:
    """Return the final model's accuracy over the rows that `holdings` keep for testing."""
    kept = [one.held_out for one in holdings.values()]
    model = recipe.build()
    model.load_state_dict(dict(read(folder / MODEL)[""]))
    x, y = torch.cat([rows.x for rows in kept]), torch.cat([rows.y for rows in kept])
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())


def _own(experiment: str) -> Mapping[str, Figure]:
    name = f"simulations.{experiment}.figures"
    if importlib.util.find_spec(name) is None:
        return {}
    own: Mapping[str, Figure] = importlib.import_module(name).FIGURES
    return own


def _final(folder: Path, score: str) -> float:
    scores: Mapping[str, float] = json.loads((folder / "summary.json").read_text())["scores"]
    if score not in scores:
        raise ConfigError(f"{folder}: no score {score!r}; there are {', '.join(sorted(scores))}")
    return scores[score]


def _first(scores: Mapping[int, float], target: float) -> float:
    return next((float(number) for number, value in scores.items() if value >= target), math.inf)
