"""Runs of Flower apps, as they are submitted and as each order of one says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from fedml.durable import dump_json
from fedml.errors import ConfigError, MalformedMessage
from fedml.protocol.messages import RecipeId, check_name
from fedml.records import SCALARS, Reader, from_record, to_record

Value = bool | float | int | str  # of a setting
Values = Mapping[str, Value]
FIRST_NODE = 1000  # the first site's, to an app
_MOST = 32 * 2**10  # bytes of an app's settings, which each order has


@dataclass(frozen=True)
class AppPlan:
    """A run of the Flower app `app`, which coordinator and sites have, each its own copy.

    It begins once `least` sites are here that allow the app; those that are here then take part,
    and no others.
    """

    app: RecipeId
    config: Values
    least: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.least < 1:
            raise ConfigError(f"--num-supernodes {self.least}: at least one site must take part")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed}: must be from 0 to {2**63 - 1}")
        check_name("app", self.app.name)
        if (size := len(dump_json(dict(self.config)))) > _MOST:
            raise ConfigError(f"the app's settings take {size} bytes, at most {_MOST} may")

    def to_json(self) -> str:
        """Return canonical JSON; what a plan of rounds never has is the key `app`."""
        record = cast(dict[str, object], to_record(self))
        return dump_json({**record, "model": self.app.name, "rounds": 0}).decode()

    @staticmethod
    def from_json(text: str) -> AppPlan:
        """Return what `to_json` wrote; raises `ConfigError`."""
        try:
            record = json.loads(text)
            named = record.pop("model", "") == record["app"]["name"]
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"the plan of an app does not read: {error}") from error
        if not named or record.pop("rounds", None) != 0:
            raise ConfigError("the plan of an app is called after it, and says no rounds")
        return from_record(AppPlan, record, "plan", _READERS)


def is_app_plan(text: str) -> bool:
    """True if a submitted plan is an app's, whether or not it reads."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and "app" in record


@dataclass(frozen=True)
class AppTerms:
    """What an order says of its app: the settings, and which node the site is to it.

    `messages` is how many the site had of the run before.
    """

    node: int
    messages: int
    config: Values

    def to_json(self) -> str:
        """Return canonical JSON, as it travels in `Assignment.app`."""
        return dump_json(to_record(self)).decode()

    @staticmethod
    def from_json(text: str) -> AppTerms:
        """Return what `to_json` wrote; raises `MalformedMessage`."""
        try:
            return from_record(AppTerms, json.loads(text), "app", _READERS)
        except (ValueError, RecursionError, ConfigError) as error:
            raise MalformedMessage(f"app: {error}") from error


def read_values(raw: object) -> dict[str, Value]:
    """Return settings that are texts, numbers and booleans; raises `ConfigError` on others."""
    if not isinstance(raw, Mapping) or not all(type(v) in SCALARS for v in raw.values()):
        raise ConfigError("must be an object of texts, numbers and booleans")
    return {str(key): value for key, value in raw.items()}


_READERS: Mapping[object, Reader] = {Values: read_values}
