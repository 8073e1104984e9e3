"""What a coordinator's operator took in, each kept under its digest: strategies, and Flower apps.

A run names the digest, so it goes on with the very code it began with, whatever is taken in later.
"""

from __future__ import annotations

from pathlib import Path

from fedml import codebase, durable
from fedml.coordinator.folder import APPS, STRATEGIES
from fedml.coordinator.settings import read_settings
from fedml.installed import keep
from fedml.protocol.messages import check_name
from fedml.strategies import STRATEGIES as TABLE


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
