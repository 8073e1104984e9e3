"""Strategies by name: how one is written into a plan and read from it, with no code on the wire.

The table is closed: what this package has, and what installed packages offer under the entry
point group `fedml.strategies` (a frozen dataclass that is a `Strategy`). A plan that names
anything else is refused, so a coordinator never builds what a stranger describes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points

import torch

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.protocol.tasks import Brief
from fedml.records import Reader, from_record, to_record
from fedml.strategies.base import LocalRule, Plain, Reducer, Statistic, Strategy
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.fedavgm import FedAvgM
from fedml.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from fedml.strategies.fedprox import FedProx, Prox
from fedml.strategies.newton import Curvature, Newton
from fedml.strategies.reducers import WeightedMean
from fedml.strategies.robust import (
    Bulyan,
    CentredClipping,
    GeometricMedian,
    Krum,
    MeanAroundMedian,
    Median,
    MultiKrum,
    Robust,
    TrimmedMean,
)

RULES: Mapping[str, LocalRule] = {"plain": Plain(), "prox": Prox()}
STATISTICS: Mapping[str, Statistic] = {"newton": Curvature()}  # names that RULES does not have
REDUCERS: Mapping[str, type[Reducer]] = {
    "weighted-mean": WeightedMean,
    "robust": Robust,
    "median": Median,
    "trimmed-mean": TrimmedMean,
    "mean-around-median": MeanAroundMedian,
    "krum": Krum,
    "multi-krum": MultiKrum,
    "bulyan": Bulyan,
    "geometric-median": GeometricMedian,
    "centred-clipping": CentredClipping,
}
_OURS: Mapping[str, type[Strategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "newton": Newton,
}


@cache
def strategies() -> Mapping[str, type[Strategy]]:
    """Return every strategy there is, by name; a plug-in cannot take one of our names."""
    found: dict[str, type[Strategy]] = {}
    for point in entry_points(group="fedml.strategies"):
        try:
            found[point.name] = point.load()
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"strategy plug-in {point.name!r} ({point.value}) does not load: {error}; "
                "mend or uninstall its package"
            ) from error
    return {**found, **_OURS}


def reports(brief: Brief) -> frozenset[str]:
    """Return the names of the slots that an answer to `brief` has.

    Raises `ConfigError` if its rule is not installed.
    """
    if brief.rule in STATISTICS:
        return STATISTICS[brief.rule].reports(brief)
    if brief.rule in RULES:
        return RULES[brief.rule].reports
    table = {**RULES, **STATISTICS}
    raise ConfigError(f"rule {brief.rule!r} is not installed; there are {_list(table)}")


def measures(strategy: Strategy) -> bool:
    """Return whether its sites report a `Statistic`: exact numbers, which no noise hides."""
    probe = Params({"w": torch.zeros(1)})
    return strategy.brief(strategy.start(probe)).rule in STATISTICS


def describe(strategy: Strategy) -> dict[str, object]:
    """Return `strategy` as JSON values: its name and every setting, defaults too.

    Raises `ConfigError` if its class is in no table, for then no plan can carry it.
    """
    return _describe(strategies(), "strategy", strategy)


def build(settings: Mapping[str, object]) -> Strategy:
    """Return the strategy that `describe` wrote; settings left out take their defaults.

    Raises one `ConfigError` with all that is unknown or out of range.
    """
    return _build(strategies(), "strategy", settings)


def _describe(table: Mapping[str, type], what: str, thing: object) -> dict[str, object]:
    for name, kind in table.items():
        if type(thing) is kind and dataclasses.is_dataclass(thing):
            record = to_record(thing)
            assert isinstance(record, dict)
            if isinstance(reducer := getattr(thing, "reducer", None), tuple(REDUCERS.values())):
                record["reducer"] = _describe(REDUCERS, "reducer", reducer)
            return {"name": name, **record}
    raise ConfigError(f"{what} {type(thing).__name__} is not installed; there are {_list(table)}")


def _build(table: Mapping[str, type], what: str, settings: object) -> Strategy:
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise ConfigError(f"{what} {settings!r:.60}: needs a name; there are {_list(table)}")
    name = settings["name"]
    if name not in table:
        raise ConfigError(f"{what} {name!r:.60} is not installed; there are {_list(table)}")
    rest = {key: value for key, value in settings.items() if key != "name"}
    readers: dict[object, Reader] = {Reducer: lambda raw: _build(REDUCERS, "reducer", raw)}
    built: Strategy = from_record(table[name], rest, name, readers)
    return built


def _list(table: Mapping[str, object]) -> str:
    return ", ".join(sorted(table))
