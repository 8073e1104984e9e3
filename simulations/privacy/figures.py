"""The figure of this experiment: accuracy in percent over the test rows of all sites, as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from simulations.figures import Figure, percent_right_of
from simulations.privacy.data import Sites
from simulations.privacy.recipe import cancer, digits

_RECIPES = {"cancer_linear": cancer, "digits_linear": digits}


def percent_right(folder: Path) -> float:
    """Return the final model's accuracy; sites that report it under privacy would add noise."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    recipe = _RECIPES[settings["model"]]()
    dealt = Sites(settings["population"]["sites"], settings["population"]["seed"])
    return percent_right_of(folder, recipe, dealt.deal(recipe, None))


FIGURES: Mapping[str, Figure] = {"percent right": percent_right}
