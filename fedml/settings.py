"""TOML files as frozen dataclasses: every wrong key in one line, nothing half read."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from fedml import durable
from fedml.errors import ConfigError
from fedml.records import Reader, from_record

T = TypeVar("T")


def read(
    kind: type[T], path: Path, *, absent: str, more: Mapping[object, Reader] | None = None
) -> T:
    """Return the `kind` that `path` describes; types are strict, unknown keys are refused.

    `more` builds the types it names.

    Raises `ConfigError` naming the file, each bad key and its value, or `absent` (the way out)
    if there is no such file.
    """
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; {absent}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    try:
        readers = {Path: lambda text: Path(str(text)), **(more or {})}
        return from_record(kind, raw, path.stem, readers)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def write(value: Any, path: Path) -> None:  # noqa: ANN401 - any flat dataclass
    """Write a flat dataclass of strings, numbers and booleans, durably."""
    lines = (f"{key} = {json.dumps(item)}\n" for key, item in asdict(value).items())
    durable.replace(path, "".join(lines).encode())
