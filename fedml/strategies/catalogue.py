"""Strategies by name: how one is written into a plan and read from it, with no code on the wire.

The tables are closed: what this package has, what installed packages offer under the entry point
groups of `fedml.installed`, and the files of whoever runs this process. A plan that names anything
else is refused, so a coordinator never builds what a stranger describes. What is not ours is named
with the SHA-256 of its source, so that two machines mean the same code or find out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TypeVar, cast

import torch

from fedml.errors import ConfigError, Contradiction
from fedml.installed import Table
from fedml.params import Layout, Params
from fedml.protocol.messages import Training, check_name
from fedml.protocol.tasks import Brief, Slots
from fedml.records import Reader, from_record, to_record
from fedml.strategies.base import (
    NUMBER,
    Contrast,
    LocalRule,
    Personal,
    Plain,
    Reducer,
    Statistic,
    Strategy,
    Twofold,
)
from fedml.strategies.cyclic import Cyclic
from fedml.strategies.ditto import Ditto, Own
from fedml.strategies.fedasync import FedAsync
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.fedavgm import FedAvgM
from fedml.strategies.fedbn import FedBN
from fedml.strategies.fedbuff import FedBuff
from fedml.strategies.feddyn import Dynamic, FedDyn
from fedml.strategies.fedexp import FedExP, Squared
from fedml.strategies.fednova import FedNova, Normalised
from fedml.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from fedml.strategies.fedper import FedPer, Home
from fedml.strategies.fedprox import FedProx, Prox
from fedml.strategies.fedrep import Alternate, FedRep
from fedml.strategies.kmeans import KMeans, Nearest
from fedml.strategies.lbfgs import LBFGS, Slope
from fedml.strategies.moon import Moon, Views
from fedml.strategies.newton import Curvature, Newton
from fedml.strategies.pca import PCA, Moments
from fedml.strategies.pfedme import Envelope, PFedMe
from fedml.strategies.qfedavg import Fair, QFedAvg
from fedml.strategies.reducers import WeightedMean
from fedml.strategies.robust import (
    Bulyan,
    CentredClipping,
    FLTrust,
    GeometricMedian,
    Krum,
    MeanAroundMedian,
    Median,
    MultiKrum,
    Robust,
    TrimmedMean,
)
from fedml.strategies.scaffold import Control, Scaffold
from fedml.strategies.xgboost import Histograms, XGBoost

T = TypeVar("T")
_DIGEST = "digest"  # beside "name" in the record of what is not ours


def _made(thing: object) -> object:
    return thing() if isinstance(thing, type) else thing


def _take_rule(thing: object) -> LocalRule:
    """Return a rule, made if it is a class; it has no settings but those of a brief."""
    rule = _made(thing)
    told = getattr(rule, "reports", None)
    if not (callable(getattr(rule, "gradient", None)) and callable(getattr(rule, "finish", None))):
        raise ConfigError("is no LocalRule: it needs reports, gradient and finish")
    if not (isinstance(told, frozenset) and all(isinstance(name, str) for name in told)):
        raise ConfigError("is no LocalRule: reports must be a frozenset of names")
    return cast(LocalRule, rule)


def _take_statistic(thing: object) -> Statistic:
    statistic = _made(thing)
    parts = (getattr(statistic, name, None) for name in ("reports", "measure"))
    if not all(callable(part) for part in parts):
        raise ConfigError("is no Statistic: it needs reports and measure")
    return cast(Statistic, statistic)


def _take_class(thing: object, what: str, parts: tuple[str, ...]) -> type:
    """Return a frozen dataclass that has `parts`, among its fields or beside them."""
    frozen = isinstance(thing, type) and getattr(thing, "__dataclass_params__", None)
    if not (isinstance(thing, type) and frozen and frozen.frozen):
        raise ConfigError(f"is no {what}: it must be a frozen dataclass")
    names = {field.name for field in dataclasses.fields(thing)}
    if lacking := [part for part in parts if part not in names and not hasattr(thing, part)]:
        raise ConfigError(f"is no {what}: it lacks {', '.join(lacking)}")
    if taken := sorted(names & {"name", _DIGEST}):
        raise ConfigError(f"has a setting {taken[0]!r}, which a plan needs: rename it")
    return thing


def _take_strategy(thing: object) -> type[Strategy]:
    return _take_class(thing, "Strategy", ("reducer", "start", "brief", "advance"))


def _take_reducer(thing: object) -> type[Reducer]:
    return _take_class(thing, "Reducer", ("linear", "least", "start"))


RULES: Table[LocalRule] = Table(
    "rule",
    {
        "plain": Plain(),
        "prox": Prox(),
        "scaffold": Control(),
        "fednova": Normalised(),
        "feddyn": Dynamic(),
        "fedexp": Squared(),
        "qfedavg": Fair(),
        "home": Home(),
        "fedrep": Alternate(),
        "ditto": Own(),
        "pfedme": Envelope(),
        "moon": Views(),
    },
    _take_rule,
    lambda: STATISTICS.ours,
)
STATISTICS: Table[Statistic] = Table(
    "statistic",
    {
        "newton": Curvature(),
        "xgboost": Histograms(),
        "lbfgs": Slope(),
        "kmeans": Nearest(),
        "pca": Moments(),
    },
    _take_statistic,
    lambda: RULES.ours,
)
REDUCERS: Table[type[Reducer]] = Table(
    "reducer",
    {
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
        "fltrust": FLTrust,
    },
    _take_reducer,
)
STRATEGIES: Table[type[Strategy]] = Table(
    "strategy",
    {
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
        "fedrep": FedRep,
        "ditto": Ditto,
        "pfedme": PFedMe,
        "moon": Moon,
        "cyclic": Cyclic,
        "newton": Newton,
        "xgboost": XGBoost,
        "fedbuff": FedBuff,
        "fedasync": FedAsync,
        "lbfgs": LBFGS,
        "kmeans": KMeans,
        "pca": PCA,
    },
    _take_strategy,
)


def own(file: str, name: str = "", **settings: object) -> Strategy:
    """Return a strategy of the user's own, `file.py:Class`, which this process knows from now on.

    Its name is the class's in small letters, unless `name` says otherwise.
    """
    name = check_name("strategy", name or file.rpartition(":")[2].lower())
    kind, _ = STRATEGIES.taken(STRATEGIES.lend(name, file))
    try:
        return kind(**settings)
    except TypeError as error:
        raise ConfigError(f"strategy {name}: {error}") from error


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
    half = RULES.get(brief.rule) or STATISTICS.get(brief.rule)
    found: frozenset[str] = getattr(half, "numbers", frozenset())
    return found


def wide(rule: str, settings: Mapping[str, float]) -> Mapping[str, Layout]:
    """Return how those slots are laid out that `rule` reports as what no model is shaped like."""
    told = getattr(STATISTICS.get(rule), "layouts", None)
    return told(settings) if told else {}


def layouts(brief: Brief, slots: Collection[str]) -> Mapping[str, Layout]:
    """Return the layout of each of `slots` in an answer to `brief`."""
    other = {**dict.fromkeys(numbers(brief), NUMBER), **wide(brief.rule, brief.settings)}
    return {name: other.get(name, brief.params.layout) for name in slots}


def own_model(brief: Brief, memory: Slots) -> Params:
    """Return the model that a site with this memory is scored with."""
    rule = RULES.get(brief.rule)
    return rule.begin(brief, memory) if isinstance(rule, Personal) else brief.params


def first_model(brief: Brief, memory: Slots) -> Params:
    """Return the model from which a site with this memory takes the steps that it reports."""
    return brief.params if is_twofold(brief) else own_model(brief, memory)


def is_personal(brief: Brief) -> bool:
    """Return whether sites train and score models of their own."""
    return isinstance(RULES.get(brief.rule), Personal)


def is_twofold(brief: Brief) -> bool:
    """Return whether sites have models of their own beside the one that they train for all."""
    return isinstance(RULES.get(brief.rule), Twofold)


def scores_exact(strategy: Strategy) -> bool:
    """Return whether sites score models of their own that no noise hides."""
    return is_twofold(_brief(strategy))


def rule_of(strategy: Strategy) -> str:
    """Return the name of the local rule that its sites follow."""
    return _brief(strategy).rule


def measures(strategy: Strategy) -> bool:
    """Return whether its sites report exact numbers made of rows, which no noise hides."""
    rule = rule_of(strategy)
    return rule in STATISTICS or bool(getattr(RULES.get(rule), "reads_loss", False))


def is_bounded(strategy: Strategy) -> bool:
    """Return whether what its sites measure has a bound that a clip can be."""
    return bool(getattr(STATISTICS.get(rule_of(strategy)), "bounded", False))


def in_turn(strategy: Strategy) -> bool:
    """Return whether each round asks one site, one after the other."""
    return bool(getattr(strategy, "in_turn", False))


def contrasts(strategy: Strategy) -> bool:
    """Return whether its sites add to their recipe's loss a term of representations."""
    return isinstance(RULES.get(rule_of(strategy)), Contrast)


def needs_means(strategy: Strategy) -> bool:
    """Return whether its sites report more than a delta, which only means leave in step."""
    return bool(reports(_brief(strategy)))


def needs_exact_model(strategy: Strategy) -> bool:
    """Return whether what its sites report belongs to the very bits of the model."""
    return bool(getattr(STATISTICS.get(_brief(strategy).rule), "needs_exact_model", False))


def keeps_deltas(strategy: Strategy) -> bool:
    """Return whether its sites and the coordinator add up the same deltas, each for itself."""
    return bool(getattr(RULES.get(_brief(strategy).rule), "keeps_deltas", False))


def not_at_once(brief: Brief) -> str:
    """Return why many sites cannot train on `brief` as one computation, or ""."""
    rule = RULES.get(brief.rule)
    if rule is None or not getattr(rule, "elementwise", False):
        return f"rule {brief.rule} is not elementwise"
    return ""


def one_by_one(strategy: Strategy) -> str:
    """Return why a simulation cannot train all of its sites as one computation, or ""."""
    return not_at_once(_brief(strategy))


def _brief(strategy: Strategy) -> Brief:
    return strategy.brief(strategy.start(specimen(strategy)))


def objections(strategy: Strategy, training: Training) -> tuple[str, ...]:
    """Return why its sites cannot train as `training` says, each reason with the way out."""
    told = getattr(strategy, "objections", None)
    return tuple(told(training)) if told else ()


def check_model(strategy: Strategy, params: Params, rounds: int) -> None:
    """Raise `Contradiction` with every reason why `rounds` from such a model cannot work."""
    told = getattr(strategy, "misfits", None)
    if reasons := tuple(told(params, rounds)) if told else ():
        raise Contradiction(reasons)


def specimen(strategy: Strategy) -> Params:
    """Return a small model that the strategy takes: one that is particular has its own."""
    made = getattr(strategy, "specimen", None)
    return cast(Params, made()) if made else Params({"w": torch.zeros(1)})


def describe(strategy: Strategy) -> dict[str, object]:
    """Return `strategy` as JSON values: its name and every setting, defaults too.

    What is not ours has its source's digest beside the name. Raises `ConfigError` if its class is
    in no table, for then no plan can carry it.
    """
    return _describe(STRATEGIES, strategy)


def build(settings: Mapping[str, object]) -> Strategy:
    """Return the strategy that `describe` wrote; settings left out take their defaults.

    Raises one `ConfigError` with all that is unknown or out of range, or if what is here by that
    name is not of the digest that is given.
    """
    return _build(STRATEGIES, settings)


def _describe(table: Table[type[T]], thing: object) -> dict[str, object]:
    try:
        name, digest = table.named(type(thing))
    except KeyError as error:
        raise ConfigError(
            f"{table.kind} {type(thing).__name__} is not installed; there are {_list(table)}"
        ) from error
    record = cast(dict[str, object], to_record(thing))
    reducer = getattr(thing, "reducer", None)
    if "reducer" in record and reducer is not None:
        record["reducer"] = _describe(REDUCERS, reducer)
    return {"name": name, **({_DIGEST: digest} if digest else {}), **record}


def _build(table: Table[type[T]], settings: object) -> T:
    what = table.kind
    if not isinstance(settings, Mapping) or not isinstance(settings.get("name"), str):
        raise ConfigError(f"{what} {settings!r:.60}: needs a name; there are {_list(table)}")
    name, rest = settings["name"], {k: v for k, v in settings.items() if k != "name"}
    if name not in table:
        raise ConfigError(
            f"{what} {name!r:.60} is not installed; there are {_list(table)}; install its "
            "package, or let an operator allow its file"
        )
    digest = rest.get(_DIGEST) if name not in table.ours else None
    kind, found = table.find(name, digest if isinstance(digest, str) else "")
    if found:
        rest.pop(_DIGEST, None)
    readers: dict[object, Reader] = {Reducer: lambda raw: _build(REDUCERS, raw)}
    return from_record(kind, rest, name, readers)


def _list(table: Mapping[str, object]) -> str:
    return ", ".join(sorted(table))
