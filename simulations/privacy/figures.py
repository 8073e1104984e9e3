"""The figure of this experiment: accuracy in percent over the test rows of all sites, as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from fedml.params import read
from simulations.figures import Figure
from simulations.privacy.data import Sites
from simulations.privacy.recipe import cancer, digits

_RECIPES = {"cancer_linear": cancer, "digits_linear": digits}


def percent_right(folder: Path) -> float:
    """Return the final model's accuracy; sites that report it under privacy would add noise."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    recipe = _RECIPES[settings["model"]]()
    dealt = Sites(settings["population"]["sites"], settings["population"]["seed"])
    kept = [one.held_out for one in dealt.deal(recipe, None).values()]
    model = recipe.build()
    model.load_state_dict(dict(read(folder / "model.safetensors")[""]))
    x, y = torch.cat([rows.x for rows in kept]), torch.cat([rows.y for rows in kept])
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).double().mean())


FIGURES: Mapping[str, Figure] = {"percent right": percent_right}
