"""What a coordinator's operator took in, each kept under its digest: strategies, and Flower apps.

A run names the digest, so it goes on with the very code it began with, whatever is taken in later.
"""

from __future__ import annotations

from pathlib import Path

from fedml import codebase, durable
from fedml.coordinator.folder import APPS, STRATEGIES
from fedml.coordinator.settings import read_settings
from fedml.errors import ConfigError
from fedml.installed import keep
from fedml.protocol.messages import RecipeId, RunId, check_name
from fedml.strategies import STRATEGIES as TABLE

_LONGEST = 2**20  # bytes of an outcome that travels


def allow_strategy(folder: Path, target: str, name: str = "") -> tuple[str, str]:
    """Take in a strategy, `file.py:Class`; return the name and digest by which runs name it.

    Raises `ConfigError` if it does not load, is no strategy, or has the name of another.
    """
    read_settings(folder)
    own = name or target.rpartition(":")[2].lower()
    offer = TABLE.lend(check_name("strategy", own), target)
    return offer.name, keep(offer, folder / STRATEGIES)


def allow_app(folder: Path, app: Path, name: str) -> str:
    """Take in a Flower app's folder; return the digest by which runs name it."""
    read_settings(folder)
    place = folder / APPS
    durable.make_folder(place)
    return codebase.keep(app, place, check_name("app", name))[1]


def copy_of(folder: Path, app: RecipeId) -> Path:
    """Return where the coordinator in `folder` keeps an app; raises `ConfigError` if nowhere."""
    place = codebase.place(folder.resolve() / APPS, app.name, app.digest)
    if not place.is_dir():
        raise ConfigError(
            f"app {app.name} {app.digest[:12]} is not allowed here; the coordinator's operator "
            "runs: fedml coordinator allow-app FOLDER APP_DIR"
        )
    return place


def run_folder(folder: Path, run: RunId) -> Path:
    """Return what an app's run has for its own at the coordinator in `folder`."""
    return folder.resolve() / APPS / "runs" / run


def result(folder: Path, run: RunId) -> str:
    """Return what an app's run came to, as JSON; "" while it goes on, or if it is too long."""
    path = run_folder(folder, run) / "result.json"
    return path.read_text() if path.exists() and path.stat().st_size <= _LONGEST else ""
