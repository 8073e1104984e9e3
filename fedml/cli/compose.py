"""From Hydra configurations to our objects. The only module that knows Hydra.

Configurations are typed objects: `_target_` names a class of ours, its fields are the settings.
Whatever is wrong with a name, a key or a value becomes one `ConfigError` line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import fedml
from fedml import durable
from fedml.errors import ConfigError, FedmlError
from fedml.learning.recipe import load
from fedml.params import Params
from fedml.protocol.messages import RunId
from fedml.records import to_record
from fedml.rounds import Commit, Plan, Run
from fedml.simulation import results
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.base import MakeExecutor, Memory
from fedml.simulation.population import Data, Population
from fedml.simulation.world import MakeWorld
from fedml.strategies import Strategy, describe

_VERSION = "1.3"  # of Hydra's behaviour
_PLAN = tuple(field.name for field in fields(Plan))
_STAGE = ("data", "population", "world", "executor", "tracking", "checkpoint", "resume", "recipes")
_OURS = ("fedml.",)  # below which a `_target_` may lie
_IDENTIFY = "fedml.learning.recipe.identify"


def configs() -> Path:
    """Return the folder of our configurations: in the package, or beside it in a source tree."""
    package = Path(fedml.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "simulate.yaml").is_file():
            return folder
    raise ConfigError(f"no configs in {package} nor beside it; install fedml-consortium again")


def compose_plan(
    config_name: str, overrides: Sequence[str], config_dir: Path | None = None
) -> Plan:
    """Return the plan that a configuration and `overrides` such as `rounds=5` describe.

    `config_dir` is a folder of the user's own configurations, searched beside ours. Raises
    `ConfigError` in one line, or `Contradiction` with all conflicts.
    """
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
        _clear_errors(),
        hydra.initialize_config_dir(str(home), version_base=_VERSION, job_name="fedml"),
    ):
        return _plan(_values(hydra.compose(config_name, searched), _STAGE))


def simulate(argv: Sequence[str]) -> int:
    """Run `fedml simulate` with Hydra's own command line; return the exit status.

    Prints one line a round; results lie in Hydra's output folder. Raises `ConfigError` in one
    line. Several jobs (`-m`) all run; the first error is raised when they are through.
    """
    ends: list[bool] = []
    errors: list[FedmlError] = []

    def job(config: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            with _clear_errors():
                ends.append(_simulate_once(config, folder))
        except FedmlError as error:  # kept from Hydra, which would print a traceback
            errors.append(error)

    command = hydra.main(config_path=str(configs()), config_name="simulate", version_base=_VERSION)(
        job
    )
    with _command_line(argv), _clear_errors():
        try:
            command()
        except SystemExit as leave:  # --help, --info and argparse's own complaints
            return leave.code if isinstance(leave.code, int) else int(bool(leave.code))
    if errors:
        raise errors[0]
    return 0 if all(ends) else 1


@dataclass(frozen=True)
class _Stage:
    """A simulation's settings beside the plan."""

    data: Data | None
    population: Population
    world: MakeWorld
    executor: MakeExecutor


def _simulate_once(config: DictConfig, folder: Path) -> bool:
    with _own_modules():
        values = _values(config, targets=(*_OURS, "simulations."))
    rest = {key: values.pop(key, None) for key in _STAGE}
    recipes = cast(Mapping[str, str], rest["recipes"] or {})
    stage = _Stage(**{key: rest[key] for key in ("data", "population", "world", "executor")})  # type: ignore[arg-type]
    plan = _plan(values)
    recipe = load(plan.recipe, recipes)
    holdings = stage.population.deal(recipe, stage.data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        params = Params(recipe.build().state_dict())
    run = Run.begin(RunId("simulation"), plan, params)
    executor = stage.executor(plan, recipe, holdings, Memory())
    world = stage.world(plan, holdings)
    engine = Engine(run, executor, statuses(plan, holdings), world, watch=_tell)
    outcome = engine.play()
    results.write(folder, plan, outcome)
    resolved = OmegaConf.to_yaml(config, resolve=True)
    durable.replace(folder / "config.yaml", resolved.encode())
    print(f"{outcome.end.state}: {outcome.end.detail}")
    print(f"results are in {folder}")
    return outcome.end.state == "done"


def _tell(commit: Commit) -> None:
    receipt = commit.receipt
    numbers = {**receipt.metrics, **receipt.scores}
    shown = ", ".join(f"{name} {value:.4f}" for name, value in numbers.items())
    what = "round" if receipt.kind == "train" else "scores after round"
    who = f"{len(receipt.counted)} of {len(receipt.asked)} sites"
    print(f"{what} {receipt.round}: {who}" + (f", {shown}" if shown else ""))
    for site, reason in receipt.missing.items():
        print(f"  without {site}: {reason}")


def _values(
    config: DictConfig, without: Sequence[str] = (), targets: Sequence[str] = _OURS
) -> dict[str, object]:
    """Return the configuration's top keys as objects, built of nothing but `targets`."""
    plain = cast(dict[str, object], OmegaConf.to_container(_known(config, without), resolve=True))
    _register(plain.get("recipe"), config.get("recipes"))
    _check_targets(plain, "", targets)
    missing = sorted(OmegaConf.missing_keys(_known(config, without)))
    if missing:
        wanted = " ".join(f"{key}=..." for key in missing)
        raise ConfigError(f"{', '.join(missing)} must be given: add {wanted}")
    values, problems = {}, list[str]()
    for key, value in plain.items():
        try:
            with _clear_errors():
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
        raise ConfigError(
            f"{', '.join(unknown)}: no such setting; there are {', '.join((*_PLAN, *_STAGE))}"
        )
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
            if not target.startswith(allowed):
                raise ConfigError(f"{told}: only names below {' or '.join(allowed)} are built")
            with _clear_errors():
                found = get_object(target)
            if not str(getattr(found, "__module__", "")).startswith(allowed):
                raise ConfigError(f"{told}: that is not fedml's own")
        for key, item in value.items():
            _check_targets(item, f"{where}.{key}" if where else str(key), targets)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _check_targets(item, f"{where}[{number}]", targets)


@contextmanager
def _own_modules() -> Iterator[None]:
    """Let the folder `simulations` of a source tree, or of here, be imported."""
    before = list(sys.path)
    sys.path[:0] = [str(home) for home in (Path.cwd(), configs().parent) if _has_own(home)]
    try:
        yield
    finally:
        sys.path[:] = before


def _has_own(home: Path) -> bool:
    return (home / "simulations").is_dir()


def _plan(values: Mapping[str, object]) -> Plan:
    """Return the plan of these fields, by the same strict reading as one from the wire."""
    record = {key: to_record(value) for key, value in values.items() if value is not None}
    record["strategy"] = describe(cast(Strategy, values.get("strategy")))
    return Plan.from_json(durable.dump_json(record))


@contextmanager
def _command_line(argv: Sequence[str]) -> Iterator[None]:
    """Hydra reads its arguments from `sys.argv`, and hides errors unless the environment says."""
    before, full = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["fedml simulate", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into one `ConfigError` line; ours pass as they are."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ImportError, TypeError, ValueError) as error:
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        for cause in causes:
            if isinstance(cause, FedmlError):
                raise cause from error
        raise ConfigError(_line(error)) from error


def _line(error: BaseException) -> str:
    text = str(error).partition("Config search path:")[0]  # the rest is for Hydra's developers
    return " ".join(text.split())
