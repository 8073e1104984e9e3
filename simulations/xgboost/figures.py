"""The figure of this experiment alone: how far the forest is from XGBoost's own on pooled rows."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path

from fedml.errors import ConfigError
from fedml.params import read
from fedml.simulation.results import MODEL
from fedml.strategies.xgboost import Shape
from simulations.figures import Figure
from simulations.xgboost.data import pooled
from simulations.xgboost.recipe import AdultTrees


def points_over_xgboost(folder: Path) -> float:
    """Return the final accuracy less that of the library `xgboost`, in percentage points.

    It is given all rows, and the settings of the run: trees, depth, bins, eta, lambda and others.
    """
    shape = Shape.of(read(folder / MODEL)[""])
    strategy = json.loads((folder / "plan.json").read_text())["strategy"]
    ours = json.loads((folder / "summary.json").read_text())["scores"]["accuracy"]
    theirs = _pooled_accuracy(
        shape.trees,
        max_depth=shape.depth,
        max_bin=shape.bins,
        eta=strategy["eta"],
        gamma=strategy["gamma"],
        min_child_weight=strategy["min_child_weight"],
        **{"lambda": strategy["reg_lambda"]},
    )
    return 100 * (float(ours) - theirs)


@functools.cache
def _pooled_accuracy(trees: int, **settings: float) -> float:
    try:
        import xgboost
    except ImportError as error:
        raise ConfigError("xgboost is not installed: pip install xgboost-cpu") from error
    train, test = pooled(AdultTrees())
    told = {"objective": "binary:logistic", "base_score": 0.5, "tree_method": "hist", "nthread": 1}
    rows = xgboost.DMatrix(train.x.numpy(), train.y.numpy())
    model = xgboost.train({**told, **settings}, rows, trees)
    chances = model.predict(xgboost.DMatrix(test.x.numpy()))
    return float(((chances > 0.5) == (test.y.numpy() > 0)).mean())


FIGURES: Mapping[str, Figure] = {"points over pooled XGBoost": points_over_xgboost}
