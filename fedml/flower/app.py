"""A Flower app's folder, as `flwr new` makes it: what it is called, set to and made of."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedml import codebase
from fedml.errors import ConfigError
from fedml.protocol.apps import Value

T = TypeVar("T")
_PAIR = re.compile(r"""\s*([^\s=]+)=('[^']*'|"[^"]*"|\S+)""")
_ADVICE = "make an app with 'flwr new', or see docs/flower.md"


@dataclass(frozen=True)
class App:
    """An app's folder as its pyproject.toml describes it; nothing of it has been imported."""

    folder: Path
    server: str  # module:attribute
    client: str
    name: str
    config: Mapping[str, Value]
    sites: int | None  # of its default federation, where an older app names one

    def load_server(self) -> ServerApp:
        """Import the coordinator's half; raises `ConfigError` if it is not there.

        The folder stays on the path: what a site imports later is found too.
        """
        self._reach()
        return _load(self.server, "serverapp", ServerApp, self.folder)

    def load_client(self) -> ClientApp:
        """Import the sites' half; raises `ConfigError` if it is not there."""
        self._reach()
        return _load(self.client, "clientapp", ClientApp, self.folder)

    def _reach(self) -> None:
        folder = str(self.folder)
        if folder not in sys.path:
            sys.path.insert(0, folder)
        importlib.invalidate_caches()

    def digest(self) -> str:
        """Return a digest of the folder's code and settings."""
        return codebase.digest(self.folder)


def read(folder: Path) -> App:
    """Return the app in `folder`; raises `ConfigError` if its pyproject.toml describes none."""
    path = folder.resolve() / "pyproject.toml"
    try:
        raw = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; {_ADVICE}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    about = _table(raw, "tool.flwr.app", path)
    components = _table(raw, "tool.flwr.app.components", path)
    missing = [half for half in ("serverapp", "clientapp") if half not in components]
    if missing:
        raise ConfigError(
            f"{path}: [tool.flwr.app.components] has no {' and no '.join(missing)}; {_ADVICE}"
        )
    return App(
        path.parent,
        str(components["serverapp"]),
        str(components["clientapp"]),
        _name_of(raw, path.parent),
        _flat(about.get("config", {}), str(path)),
        _sites_of(raw),
    )


def overridden(config: Mapping[str, Value], words: Sequence[str]) -> dict[str, Value]:
    """Return `config` with what `words` set: `key=value ...`, or the name of one TOML file.

    As `flwr run --run-config` reads them. Raises `ConfigError` for a key that the app lacks.
    """
    wanted = dict[str, Value]()
    for text in words:
        wanted |= settings_of(text)
    if unknown := sorted(wanted.keys() - config.keys()):
        raise ConfigError(
            f"--run-config {', '.join(unknown)}: the app has no such setting; "
            f"there are {', '.join(sorted(config)) or 'none'}"
        )
    return {**config, **wanted}


def settings_of(text: str, option: str = "--run-config") -> dict[str, Value]:
    """Return what `key=value ...` says, or the TOML file of that name; raises `ConfigError`."""
    where = f"{option} {text!r}"
    if text.endswith(".toml"):
        try:
            return _flat(tomllib.loads(Path(text).expanduser().read_text()), where)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{where}: {error}") from error
    pairs = [(found[1], found[2]) for found in _PAIR.finditer(text)]
    rest = _PAIR.sub("", text).strip()
    try:
        if rest:
            raise ValueError(f"{rest!r} is no key=value")
        return _flat(tomllib.loads("\n".join(f"{k} = {v}" for k, v in pairs)), where)
    except ValueError as error:  # of TOML too
        raise ConfigError(f"{where}: {error}; write 'rounds=3 name=\"text\" save=true'") from error


def _flat(raw: object, where: str, prefix: str = "") -> dict[str, Value]:
    """Return nested tables as one level of dotted keys."""
    flat = dict[str, Value]()
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where}: {prefix or 'config'} must be a table")
    for key, value in raw.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat |= _flat(value, where, name)
        elif isinstance(value, bool | float | int | str):
            flat[name] = value
        else:
            raise ConfigError(
                f"{where}: {name} {value!r:.60}: must be a number, a text or true or false"
            )
    return flat


def _table(raw: Mapping[str, object], name: str, path: Path) -> Mapping[str, object]:
    found: object = raw
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path} has no [{name}], so it is no Flower app; {_ADVICE}")
    return found


def _name_of(raw: Mapping[str, object], folder: Path) -> str:
    """Return what the project calls itself, in the letters that names have here."""
    found = raw.get("project")
    name = found.get("name") if isinstance(found, Mapping) else None
    return re.sub(r"[^a-z0-9_-]+", "-", str(name or folder.name).lower()).strip("-_")[:63]


def _sites_of(raw: Mapping[str, object]) -> int | None:
    """Return `options.num-supernodes` of the default federation, which apps had until 1.25."""
    found: object = raw
    for part in ("tool", "flwr", "federations"):
        found = found.get(part) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    for part in (str(found.get("default")), "options", "num-supernodes"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found if isinstance(found, int) else None


def _load(reference: str, half: str, kind: type[T], folder: Path) -> T:
    module, _, attributes = reference.partition(":")
    if not module or not attributes:
        raise ConfigError(f"{half} {reference!r}: write module:attribute")
    try:
        found: object = importlib.import_module(module)
        for name in attributes.split("."):
            found = getattr(found, name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        advice = (
            f"is it in {folder}?"
            if missing == module.partition(".")[0]
            else "install what the app's pyproject.toml lists: pip install APP_DIR"
        )
        raise ConfigError(f"{half} {reference}: no module {error.name!r}; {advice}") from error
    except Exception as error:
        raise ConfigError(f"{half} {reference}: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise ConfigError(f"{half} {reference} is {type(found).__name__}, not {kind.__name__}")
    return found
