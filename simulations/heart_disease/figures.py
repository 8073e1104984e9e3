"""Figures of this experiment alone: accuracy hospital by hospital, and the pooled optimum."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedml.learning.evaluation import evaluate
from fedml.learning.recipe import Rows
from fedml.params import Params, read
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId
from fedml.protocol.tasks import Brief, Task
from simulations.figures import Figure
from simulations.heart_disease.data import Hospitals, pooled_test
from simulations.heart_disease.recipe import HeartDisease, HeartDisease64


def mean_of_sites(folder: Path) -> float:
    """Return the final model's mean over the hospitals of each one's own accuracy."""
    params = _model(folder)
    dealt = Hospitals().deal(_recipe(params), None).values()
    return statistics.fmean(_accuracy(params, one.held_out) for one in dealt)


def pooled_test_accuracy(folder: Path) -> float:
    """Return the final model's accuracy on FLamby's "Pooled Test" rows."""
    params = _model(folder)
    return _accuracy(params, pooled_test(_recipe(params)))


def distance_to_maximum_likelihood(folder: Path) -> float:
    """Return the largest difference of a parameter to those fitted on all hospitals' rows."""
    params = _model(folder)
    dealt = Hospitals().deal(HeartDisease64(), None).values()
    x, y = (torch.cat([getattr(one.train, part) for one in dealt]) for part in ("x", "y"))
    best = maximum_likelihood(Rows(x, y))
    found = torch.cat([params["weight"].reshape(-1), params["bias"]]).double()
    return float((found - best).abs().max())


def maximum_likelihood(rows: Rows) -> Tensor:
    """Return a logistic regression's weights and, last, its intercept, in float64.

    Iteratively reweighted least squares: McCullagh and Nelder 1989, section 2.5.
    """
    x = torch.cat([rows.x.double(), torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    y, weights = rows.y.double(), torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(50):
        chance = torch.sigmoid(x @ weights)
        spread = chance * (1 - chance)
        working = x @ weights + (y - chance) / spread
        weights = torch.linalg.solve(x.T @ (spread[:, None] * x), x.T @ (spread * working))
    return weights


def _accuracy(params: Params, rows: Rows) -> float:
    task = Task(TaskId("score"), RunId("score"), 1, SiteId("test"), "evaluate", Brief(params))
    report = evaluate(_recipe(params), task, rows, Privacy())
    return report.totals["accuracy"] / report.count


def _recipe(params: Params) -> HeartDisease:
    return HeartDisease64() if params["weight"].dtype == torch.float64 else HeartDisease()


def _model(folder: Path) -> Params:
    return read(folder / "model.safetensors")[""]


FIGURES: Mapping[str, Figure] = {
    "accuracy, mean of sites": mean_of_sites,
    "accuracy, pooled test": pooled_test_accuracy,
    "distance to the pooled maximum likelihood": distance_to_maximum_likelihood,
}
