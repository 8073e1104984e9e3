"""Figures of this experiment alone: rates made of shares, and the area under the ROC curve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from fedml.params import read
from simulations.anomaly.data import Clinics
from simulations.anomaly.recipe import Anomaly
from simulations.figures import Figure


def detection_rate(folder: Path) -> float:
    """Return the share of malignant samples that raise an alarm."""
    scores = _scores(folder)
    return scores["alarm_right"] / scores["strange"]


def false_alarms(folder: Path) -> float:
    """Return the share of held-out benign samples that raise an alarm."""
    scores = _scores(folder)
    return scores["alarm_wrong"] / (1 - scores["strange"])


def roc_area(folder: Path) -> float:
    """Return how often a malignant sample is stranger than a benign one, of all held-out pairs.

    Only a simulation can tell: it needs all clinics' strangeness in one place.
    """
    settings = yaml.safe_load((folder / "config.yaml").read_text())["population"]
    dealt = Clinics(settings["sites"], settings["seed"], settings["only"]).deal(Anomaly(), None)
    model = Anomaly().build()
    model.load_state_dict(dict(read(folder / "model.safetensors")[""]))
    with torch.no_grad():
        found = [(model(one.held_out.x)[:, 0], one.held_out.y) for one in dealt.values()]
    strangeness, y = (torch.cat(parts) for parts in zip(*found, strict=True))
    return float((strangeness[y == 1][:, None] > strangeness[y == 0]).float().mean())


def _scores(folder: Path) -> Mapping[str, float]:
    scores: Mapping[str, float] = json.loads((folder / "summary.json").read_text())["scores"]
    return scores


FIGURES: Mapping[str, Figure] = {
    "detection rate": detection_rate,
    "false alarms": false_alarms,
    "ROC area": roc_area,
}
