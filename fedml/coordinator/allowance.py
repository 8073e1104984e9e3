"""A coordinator's own strategies: files that its operator took in, each kept under its digest.

A run names the digest, so it goes on with the very code it began with, whatever is taken in later.
"""

from __future__ import annotations

from pathlib import Path

from fedml.coordinator.folder import STRATEGIES
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
