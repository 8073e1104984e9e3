"""Which registry a coordinator's setting names: MLflow by its URI, or one of another package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from fedml.errors import ConfigError
from fedml.installed import Table
from fedml.releases.registry import Registry

MakeRegistry = Callable[[str, Path], Registry]  # of a place, and a folder to keep bundles in
_MLFLOW = "fedml.releases.tracking:MlflowRegistry"
_PARTS = ("next_version", "stage", "promote", "withdraw", "get", "list", "bundle")


def _take(thing: object) -> MakeRegistry:
    lacking = [part for part in _PARTS if not hasattr(thing, part)]
    if not isinstance(thing, type) or lacking:
        more = f", and lacks {', '.join(lacking)}" if lacking else ""
        raise ConfigError(f"is no Registry: it must be a class made of (place, folder){more}")
    return cast(MakeRegistry, thing)


REGISTRIES: Table[MakeRegistry] = Table(
    "registry",
    dict.fromkeys(("sqlite", "postgresql", "mysql", "mssql", "http", "https", "file"), _MLFLOW),
    _take,
)


def open_registry(uri: str, folder: Path) -> Registry:
    """Open the registry that `uri` names; `NAME:PLACE` is that of a package that offers NAME.

    MLflow's takes seconds, and migrates its database when it must.
    """
    from fedml.releases.tracking import MlflowRegistry

    name, _, place = uri.partition(":")
    if name in REGISTRIES and REGISTRIES[name] is not MlflowRegistry:
        return REGISTRIES[name](place, folder)
    return MlflowRegistry(uri, folder / "artifacts")
