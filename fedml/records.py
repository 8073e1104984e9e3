"""Frozen dataclasses to and from plain JSON values, strictly.

What is written is explicit (defaults too), so that it means the same when a default changes.
What is read must fit the type: unknown and missing keys, wrong types and bad values are all
collected, and raised together as one `ConfigError` line.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Literal, NewType, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from fedml.errors import ConfigError, Contradiction

T = TypeVar("T")
Reader = Callable[[object], object]
SCALARS: Mapping[object, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def to_record(value: object) -> object:
    """Return `value`, a dataclass of scalars, tuples, mappings and dataclasses, as JSON values.

    A field declared `float` is written as one, so 60 and 60.0 have the same bytes.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value))
        fields = [f.name for f in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), hints[name]) for name in fields}
    if isinstance(value, Mapping):
        return {str(key): to_record(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_record(item) for item in value]
    return value


def flatten(record: object, prefix: str = "") -> dict[str, str]:
    """Return nested settings as one level of dotted names, as a tracking page shows them."""
    if isinstance(record, dict):
        flat: dict[str, str] = {}
        for key, value in record.items():
            flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: str(record)}


def _plain(value: object, hint: object) -> object:
    floats = hint is float or float in get_args(hint)
    if floats and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return to_record(value)


def from_record(
    kind: type[T], raw: object, what: str, readers: Mapping[object, Reader] | None = None
) -> T:
    """Return the `kind` that `to_record` wrote as `raw`; raises `ConfigError` on anything odd.

    `what` is how to call the whole in messages. `readers` builds the types it names.
    """
    reading = _Reading(readers or {})
    value = reading.read(kind, raw, what)
    if reading.problems:
        raise ConfigError("; ".join(reading.problems))
    return cast(T, value)


class _Reading:
    """One pass over a value; a problem is noted and reading goes on."""

    def __init__(self, readers: Mapping[object, Reader]) -> None:
        self.readers, self.problems = readers, list[str]()

    def read(self, hint: object, raw: object, what: str) -> object:
        if hint in self.readers:
            return self.build(lambda: self.readers[hint](raw), what)
        if isinstance(hint, NewType):
            return self.read(hint.__supertype__, raw, what)
        if isinstance(hint, type) and hint in SCALARS:
            return self.scalar(hint, raw, what)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self.record(hint, raw, what)
        return self.compound(hint, raw, what)

    def compound(self, hint: object, raw: object, what: str) -> object:
        origin, args = get_origin(hint), get_args(hint)
        if origin is Literal:
            if raw not in args:
                self.problems.append(f"{what} {raw!r:.60}: use one of {list(args)}")
            return raw
        if origin in (types.UnionType, Union):
            if raw is None and type(None) in args:
                return None
            return self.read(next(a for a in args if a is not type(None)), raw, what)
        if origin is tuple:
            if not isinstance(raw, list | tuple):
                self.problems.append(f"{what} {raw!r:.60}: must be a list")
                return ()
            return tuple(self.read(args[0], item, f"{what}[{k}]") for k, item in enumerate(raw))
        if not isinstance(raw, Mapping):
            self.problems.append(f"{what} {raw!r:.60}: must be an object")
            return {}
        return {str(k): self.read(args[1], item, f"{what}.{k}") for k, item in raw.items()}

    def scalar(self, kind: type, raw: object, what: str) -> object:
        if kind is float and isinstance(raw, int | float) and not isinstance(raw, bool):
            if math.isfinite(raw):
                return float(raw)
        elif type(raw) is kind:
            return raw
        self.problems.append(f"{what} {raw!r:.60}: must be {SCALARS[kind]}")
        return None

    def record(self, kind: type, raw: object, what: str) -> object:
        if not isinstance(raw, Mapping):
            self.problems.append(f"{what} {raw!r:.60}: must be an object")
            return None
        fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
        before = len(self.problems)
        for key in raw.keys() - fields.keys():
            self.problems.append(f"{what}.{key} is unknown; there are {', '.join(fields)}")
        hints, values = get_type_hints(kind), dict[str, object]()
        for name, field in fields.items():
            if name in raw:
                values[name] = self.read(hints[name], raw[name], f"{what}.{name}")
            elif field.default is field.default_factory is dataclasses.MISSING:
                self.problems.append(f"{what}.{name} is missing")
        if len(self.problems) > before:
            return None
        return self.build(lambda: kind(**values), what)

    def build(self, make: Callable[[], object], what: str) -> object:
        try:
            return make()
        except Contradiction as error:
            self.problems.extend(error.reasons)
        except ConfigError as error:
            self.problems.append(f"{what}: {error}")
        return None
