"""The figure of this experiment: accuracy in percent over the held-out rows of honest sites."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from simulations.figures import Figure, percent_right_of
from simulations.robust.data import Sites
from simulations.robust.recipe import digits


def percent_right(folder: Path) -> float:
    """Return the final model's accuracy; guests' copies would count some rows twice."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())["population"]
    sites = Sites(settings["hosts"], 0, settings["alpha"], settings["seed"])
    return percent_right_of(folder, digits(), sites.deal(digits(), None))


FIGURES: Mapping[str, Figure] = {"percent right": percent_right}
