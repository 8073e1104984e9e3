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
from fedml.protocol.tasks import Brief, Slots
from fedml.records import Reader, from_record, to_record
from fedml.strategies.base import LocalRule, Personal, Plain, Reducer, Statistic, Strategy
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.fedavgm import FedAvgM
from fedml.strategies.fedbn import FedBN
from fedml.strategies.feddyn import Dynamic, FedDyn
from fedml.strategies.fedexp import FedExP, Squared
from fedml.strategies.fednova import FedNova, Normalised
from fedml.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from fedml.strategies.fedper import FedPer, Home
from fedml.strategies.fedprox import FedProx, Prox
from fedml.strategies.newton import Curvature, Newton
from fedml.strategies.qfedavg import Fair, QFedAvg
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
from fedml.strategies.scaffold import Control, Scaffold

RULES: Mapping[str, LocalRule] = {
    "plain": Plain(),
    "prox": Prox(),
    "scaffold": Control(),
    "fednova": Normalised(),
    "feddyn": Dynamic(),
    "fedexp": Squared(),
    "qfedavg": Fair(),
    "home": Home(),
}
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
    "scaffold": Scaffold,
    "fednova": FedNova,
    "feddyn": FedDyn,
    "fedexp": FedExP,
    "qfedavg": QFedAvg,
    "fedper": FedPer,
    "fedbn": FedBN,
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


def numbers(brief: Brief) -> frozenset[str]:
    """Return the names of those slots of an answer to `brief` that are one number each."""
    found: frozenset[str] = getattr(RULES.get(brief.rule), "numbers", frozenset())
    return found


def own_model(brief: Brief, memory: Slots) -> Params:
    """Return the model that a site with this memory trains and is scored with."""
    rule = RULES.get(brief.rule)
    return rule.begin(brief, memory) if isinstance(rule, Personal) else brief.params


def is_personal(brief: Brief) -> bool:
    """Return whether sites train and score models of their own."""
    return isinstance(RULES.get(brief.rule), Personal)


def rule_of(strategy: Strategy) -> str:
    """Return the name of the local rule that its sites follow."""
    return _brief(strategy).rule


def measures(strategy: Strategy) -> bool:
    """Return whether its sites report exact numbers made of rows, which no noise hides."""
    rule = rule_of(strategy)
    return rule in STATISTICS or bool(getattr(RULES.get(rule), "reads_loss", False))


def needs_means(strategy: Strategy) -> bool:
    """Return whether its sites report more than a delta, which only means leave in step."""
    return bool(reports(_brief(strategy)))


def keeps_deltas(strategy: Strategy) -> bool:
    """Return whether its sites and the coordinator add up the same deltas, each for itself."""
    return bool(getattr(RULES.get(_brief(strategy).rule), "keeps_deltas", False))


def _brief(strategy: Strategy) -> Brief:
    return strategy.brief(strategy.start(Params({"w": torch.zeros(1)})))


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
