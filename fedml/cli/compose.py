"""From Hydra configurations to our objects.

Configurations are typed objects: `_target_` names a class of ours, its fields are the settings.
Whatever is wrong with a name, a key or a value becomes one `ConfigError` line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import fedml
from fedml import durable
from fedml.cli.misspelt import meant, mend
from fedml.errors import ConfigError, FedmlError
from fedml.installed import Table, offers
from fedml.records import SCALARS, to_record
from fedml.rounds import Plan
from fedml.simulation.executors.catalogue import EXECUTORS
from fedml.strategies import REDUCERS, STRATEGIES, Strategy, describe

VERSION = "1.3"  # of Hydra's behaviour
_PLAN = tuple(field.name for field in fields(Plan))
_STAGE = (
    "data", "population", "world", "attackers", "executor", "tracking", "checkpoint", "resume",
    "recipes",
)  # fmt: skip
_OURS = ("fedml.",)  # below which a `_target_` may lie
SIMULATIONS = (*_OURS, "simulations.")  # the same for a simulation, which runs its user's own code
_CHOICES: Mapping[str, Table[Any]] = {  # groups whose choices a package may add to
    "strategy": STRATEGIES,
    "strategy/reducer": REDUCERS,
    "executor": EXECUTORS,
}
_IDENTIFY = "fedml.learning.recipe.identify"


def configs() -> Path:
    """Return the folder of our configurations: in the package, or beside it in a source tree."""
    package = Path(fedml.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "simulate.yaml").is_file():
            return folder
    raise ConfigError(f"no configs in {package} nor beside it; install fedml-consortium again")


def has_own(home: Path) -> bool:
    """True if `home` holds a folder of experiments, whose classes a configuration may name."""
    return (home / "simulations").is_dir()


def compose_plan(
    config_name: str, overrides: Sequence[str], config_dir: Path | None = None
) -> Plan:
    """Return the plan that a configuration and `overrides` such as `rounds=5` describe.

    `config_dir` is a folder of the user's own configurations, searched beside ours. Raises
    `ConfigError` in one line, or `Contradiction` with all conflicts.
    """
    offer_choices()
    home, searched = configs(), list(overrides)
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"--config-dir {config_dir} is no folder")
        other = config_dir.resolve()
        if (other / f"{config_name}.yaml").is_file():
            home, other = other, home  # Hydra wants the primary configuration in the first folder
        quoted = str(other).replace("'", r"\'")  # as Hydra's grammar has it
        searched.append(f"hydra.searchpath=['file://{quoted}']")
    with (
        clear_errors(lambda text: mend(text, str(home), overrides)),
        hydra.initialize_config_dir(str(home), version_base=VERSION, job_name="fedml"),
    ):
        return plan_of(build(hydra.compose(config_name, searched), _STAGE))


def build(
    config: DictConfig, without: Sequence[str] = (), targets: Sequence[str] = _OURS
) -> dict[str, object]:
    """Return the configuration's top keys as objects, built of nothing but `targets`."""
    plain = cast(dict[str, object], OmegaConf.to_container(_known(config, without), resolve=True))
    _register(plain.get("recipe"), config.get("recipes"))
    missing = sorted(OmegaConf.missing_keys(_known(config, without)))
    if missing:
        wanted = " ".join(f"{key}=..." for key in missing)
        raise ConfigError(f"{', '.join(missing)} must be given: add {wanted}")
    _check_targets(plain, "", targets)
    values, problems = {}, list[str]()
    for key, value in plain.items():
        try:
            with clear_errors():
                nested = isinstance(value, dict | list)
                values[key] = instantiate(value, _convert_="all") if nested else value
        except FedmlError as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise ConfigError("; ".join(problems))
    return values


def _known(config: DictConfig, without: Sequence[str]) -> DictConfig:
    unknown = sorted(set(map(str, config)) - {*_PLAN, *_STAGE})
    if unknown:
        raise ConfigError(f"{unknown[0]}: no such setting; {meant(unknown[0], (*_PLAN, *_STAGE))}")
    return OmegaConf.masked_copy(config, [str(key) for key in config if key not in without])


def _register(recipe: object, recipes: object) -> None:
    """Let `recipe` be found among the files that the key `recipes` names, too."""
    if isinstance(recipe, dict) and recipe.get("_target_") == _IDENTIFY and recipes:
        recipe["extra"] = OmegaConf.to_container(cast(DictConfig, recipes), resolve=True)


def _check_targets(value: object, where: str, targets: Sequence[str]) -> None:
    """Refuse a `_target_` that is not a class or function of `targets`."""
    if isinstance(value, dict):
        if "_target_" in value:
            target, allowed = str(value["_target_"]), tuple(targets)
            told = f"{where}._target_ {target!r}"
            found = _offered(target)
            if found is None:
                if not target.startswith(allowed):
                    raise ConfigError(f"{told}: only names below {' or '.join(allowed)} are built")
                with clear_errors():
                    found = get_object(target)
                if not str(getattr(found, "__module__", "")).startswith(allowed):
                    raise ConfigError(f"{told}: that is not fedml's own")
            _check_types(found, value, where)
        for key, item in value.items():
            _check_targets(item, f"{where}.{key}" if where else str(key), targets)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_targets(item, f"{where}[{number}]", targets)


def _offered(target: str) -> object:
    """Return what a package offers as `target`, or None; a name that two have is refused."""
    for table in _CHOICES.values():
        for name, own in table.ours.items():
            dotted = own.replace(":", ".") if isinstance(own, str) else _dotted(own)
            if dotted == target:
                table.find(name)
        if (found := table.offered(target)) is not None:
            return found
    return None


def _dotted(kind: object) -> str:
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"


def offer_choices() -> None:
    """Let Hydra know what packages offer, as it knows the files of our folder of configurations.

    What is no good stays a choice, and is complained of when it is chosen.
    """
    for group, table in _CHOICES.items():
        for offer in offers(table.kind):
            name = offer.name.replace("-", "_")
            if (configs() / group / f"{name}.yaml").exists():
                continue  # ours; whoever chooses it is told
            node: dict[str, object] = {"_target_": offer.dotted}
            if table is EXECUTORS:
                node["_partial_"] = True
            with suppress(ConfigError):
                node |= _defaults(table[offer.name])
            ConfigStore.instance().store(name=name, node=node, group=group, provider="installed")


def _defaults(kind: object) -> Mapping[str, object]:
    """Return the settings of a dataclass that have a plain default."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return {}
    found = {one.name: one.default for one in fields(kind) if one.init}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in found.items()
        if value is None or isinstance(value, str | int | float | bool | tuple)
    }


def _check_types(kind: object, settings: Mapping[str, object], where: str) -> None:
    """Refuse a number, text or switch that is of another type than the dataclass `kind` says."""
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return
    for name, hint in get_type_hints(kind).items():
        value, scalar = settings.get(name), SCALARS.get(hint)
        fits = type(value) is hint or (hint is float and type(value) is int)
        if scalar and name in settings and not fits:
            raise ConfigError(f"{where}.{name} {value!r:.60}: must be {scalar}")


def plan_of(values: Mapping[str, object]) -> Plan:
    """Return the plan of these fields, by the same strict reading as one from the wire."""
    record = {key: to_record(value) for key, value in values.items() if value is not None}
    record["strategy"] = describe(cast(Strategy, values.get("strategy")))
    return Plan.from_json(durable.dump_json(record))


@contextmanager
def clear_errors(mended: Callable[[str], str] = str) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into one `ConfigError` line; ours pass as they are.

    `mended` may say it in better words.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException, ImportError, TypeError, ValueError) as error:
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        for cause in causes:
            if isinstance(cause, FedmlError):
                raise cause from error
        raise ConfigError(_line(error, mended)) from error


def _line(error: BaseException, mended: Callable[[str], str]) -> str:
    text = str(error).partition("Config search path:")[0]  # the rest is for Hydra's developers
    return " ".join(mended(text).split())
