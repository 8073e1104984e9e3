"""Curves as PNG files: scores, loss and epsilon by round, and score against epsilon of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from fedml.simulation.results import Entry

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE, _DPI = (7.0, 4.2), 120
Curve = Sequence[tuple[float, float]]


def curves(entries: Sequence[Entry]) -> Mapping[str, Mapping[str, Curve]]:
    """Return what can be drawn by round: for each of score, loss and epsilon, its named curves."""
    scores: dict[str, list[tuple[float, float]]] = {}
    loss: dict[str, list[tuple[float, float]]] = {}
    spent: dict[str, float] = {}
    epsilon: dict[str, list[tuple[float, float]]] = {}
    for entry in entries:
        receipt = entry.receipt
        for name, value in receipt.scores.items():
            scores.setdefault(name, []).append((receipt.round, value))
        if "loss" in receipt.metrics:
            loss.setdefault("training loss", []).append((receipt.round, receipt.metrics["loss"]))
        if receipt.kind != "train":
            continue
        spent.update({one.site: one.epsilon for one in receipt.counted if one.epsilon})
        if spent:
            most, average = max(spent.values()), mean(spent.values())
            epsilon.setdefault("the site that spent most", []).append((receipt.round, most))
            epsilon.setdefault("mean of sites", []).append((receipt.round, average))
    return {"score": scores, "loss": loss, "epsilon": epsilon}


def draw(folder: Path, title: str, entries: Sequence[Entry]) -> list[Path]:
    """Write `score.png`, `loss.png` and `epsilon.png` into `folder`, if there are numbers."""
    labels = {
        "score": "score of the global model on held-out rows",
        "loss": "training loss, mean over the round's rows",
        "epsilon": "epsilon spent",
    }
    drawn: list[Path] = []
    for name, lines in curves(entries).items():
        if not lines:
            continue
        figure, axes = _axes(title, "round", labels[name])
        for label, points in lines.items():
            marker = "o" if len(points) < 30 else ""
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=label)
        drawn.append(_save(figure, axes, folder / f"{name}.png"))
    return drawn


Trade = Mapping[str, Mapping[float, Sequence[float]]]  # scores of each seed, by name and epsilon


def draw_trade(path: Path, title: str, score: str, trade: Trade, without: Trade) -> Path:
    """Draw `score` against epsilon: means with one standard deviation over seeds, one line a name.

    `without` are the scores of runs without privacy, at epsilon infinity: dashed, for comparison.
    """
    figure, axes = _axes(title, "epsilon of a row, over the whole run", score)
    for number, name in enumerate(sorted({*trade, *without})):
        colour = f"C{number}"
        if points := trade.get(name):
            at = sorted(points)
            means = [mean(points[epsilon]) for epsilon in at]
            sds = [spread(points[epsilon]) for epsilon in at]
            seeds = max(len(points[epsilon]) for epsilon in at)
            label = f"{name} ({seeds} seeds)" if seeds > 1 else name
            axes.errorbar(at, means, yerr=sds, marker="o", capsize=4, color=colour, label=label)
        for values in without.get(name, {}).values():
            label = f"{name} without privacy"
            axes.axhline(mean(values), linestyle="--", color=colour, alpha=0.6, label=label)
    if all(math.isfinite(e) and e > 0 for points in trade.values() for e in points):
        axes.set_xscale("log")
        at = sorted({epsilon for points in trade.values() for epsilon in points})
        axes.set_xticks(at, [f"{epsilon:g}" for epsilon in at], minor=False)
        axes.minorticks_off()
    return _save(figure, axes, path)


def spread(values: Sequence[float]) -> float:
    """Return the sample standard deviation, 0 for a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")  # no pyplot: no display, nothing global
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, axes: Axes, path: Path) -> Path:
    axes.legend(fontsize=8)
    draft = path.with_name(f".{path.name}")
    figure.savefig(draft, dpi=_DPI, format="png")
    draft.replace(path)
    return path
