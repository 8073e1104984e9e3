"""The figure of this experiment: accuracy in percent over the held-out rows of honest sites."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from fedml.params import read
from simulations.figures import Figure
from simulations.robust.data import Sites
from simulations.robust.recipe import SoftmaxRegression


def percent_right(folder: Path) -> float:
    """Return the final model's accuracy; guests' copies would count some rows twice."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())["population"]
    sites = Sites(settings["hosts"], 0, settings["alpha"], settings["seed"])
    recipe = SoftmaxRegression()
    kept = [one.held_out for one in sites.deal(recipe, None).values()]
    model = recipe.build()
    model.load_state_dict(dict(read(folder / "model.safetensors")[""]))
    x, y = torch.cat([rows.x for rows in kept]), torch.cat([rows.y for rows in kept])
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())


FIGURES: Mapping[str, Figure] = {"percent right": percent_right}
