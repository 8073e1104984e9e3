"""How a simulation is taken up again: by its folder, and only with the settings it began with.

`resume=FOLDER` takes the settings from there; `resume=true` takes up whatever lies in the output
folder, for a multirun that is started again with `hydra.sweep.dir` as before.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedml import durable
from fedml.errors import ConfigError, Corrupt
from fedml.records import flatten
from fedml.rounds import Plan

CONFIG, PLAN = "config.yaml", "plan.json"
_FREE = ("resume", "tracking", "checkpoint")  # what may be another when a simulation goes on
_TOLD = 3  # differences that are named


def expand(argv: Sequence[str]) -> list[str]:
    """Return the arguments with which Hydra writes into the folder that `resume=` names."""
    for word in argv:
        key, _, value = word.partition("=")
        if key != "resume" or value.lower() in ("true", "false", "null", ""):
            continue
        if not Path(value, CONFIG).is_file():
            raise ConfigError(f"resume={value}: no {CONFIG} there; name a simulation's folder")
        if {"-m", "--multirun"} & {*argv}:
            raise ConfigError("resume=FOLDER is for one simulation; with -m use resume=true")
        quoted = value.replace("'", r"\'")
        rest = [f"resume='{quoted}'" if other == word else other for other in argv]
        return [*rest, f"hydra.run.dir='{quoted}'", "hydra.output_subdir=null"]
    return list(argv)


def settle(config: DictConfig, folder: Path) -> DictConfig:
    """Return the settings of the simulation in `folder`, resolved, and written there.

    A fresh one takes those of `config`. One that is resumed keeps its own; raises `ConfigError`
    naming what `config` wants otherwise.
    """
    resume, path = config.get("resume"), folder / CONFIG
    begun = path.is_file() and (folder / "checkpoint").is_dir()
    if resume in (None, False) or not begun:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        (folder / PLAN).unlink(missing_ok=True)
        (folder / "tracking.json").unlink(missing_ok=True)
        fresh = config if not isinstance(resume, str) else _read(path)
        durable.replace(path, OmegaConf.to_yaml(fresh, resolve=True).encode())
        return fresh
    saved = _read(path)
    overridden = [word.partition("=")[0].lstrip("+~") for word in HydraConfig.get().overrides.task]
    if isinstance(resume, str):
        overridden = [key for key in overridden if key != "resume"]
        whole = any(OmegaConf.select(saved, key.partition("@")[0]) is None for key in overridden)
        keys = list(map(str, saved)) if whole else overridden
    else:
        keys = list(map(str, saved))
    _compare(folder, _flat(saved), _flat(config), tuple(keys))
    for key in _FREE:
        if key in overridden or any(word.startswith(f"{key}.") for word in overridden):
            saved[key] = config[key]
    return saved


def check_plan(folder: Path, plan: Plan) -> None:
    """Keep `plan` in `folder`, or raise `ConfigError` if the one there is another."""
    path = folder / PLAN
    if not path.exists():
        durable.replace(path, plan.to_json().encode() + b"\n")
        return
    before = durable.read_json(path)
    now = json.loads(plan.to_json())
    if before != now:
        _compare(folder, flatten(before), flatten(now), tuple(now))


def _read(path: Path) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError, ValueError) as error:
        raise Corrupt(f"{path} does not read ({error}); begin the simulation anew") from error


def _flat(config: DictConfig) -> Mapping[str, str]:
    return flatten(OmegaConf.to_container(config, resolve=True))


def _compare(
    folder: Path, before: Mapping[str, str], now: Mapping[str, str], keys: Sequence[str]
) -> None:
    """Raise `ConfigError` if the settings at or below `keys` differ."""

    def concerned(name: str) -> bool:
        if name.partition(".")[0] in _FREE:
            return False
        return any(name == key or name.startswith(f"{key}.") for key in keys)

    names = sorted(name for name in {*before, *now} if concerned(name))
    differ = [name for name in names if before.get(name) != now.get(name)]
    if differ:
        told = ", ".join(
            f"{name} was {before.get(name, 'not set')} and is {now.get(name, 'not set')}"
            for name in differ[:_TOLD]
        )
        more = f", and {len(differ) - _TOLD} more" if len(differ) > _TOLD else ""
        raise ConfigError(
            f"{folder} cannot go on: {told}{more}; keep the settings it began with, or begin anew"
        )
