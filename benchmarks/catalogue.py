"""The list of benchmarks: who registers here is measured by `python -m benchmarks`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks import cases
from fedml.errors import ConfigError, FedmlError

Say = Callable[[str], None]


class Skipped(FedmlError):
    """The benchmark needs what is not here; the text says how to get it."""


@dataclass(frozen=True)
class Reading:
    """What was measured, and the physical limit that was measured beside it, in one unit."""

    value: float
    limit: float
    extra: Mapping[str, float] = field(default_factory=dict)  # figures beside it, by name

    @property
    def ratio(self) -> float:
        """How many times the limit the value is."""
        return self.value / self.limit


@dataclass(frozen=True)
class Benchmark:
    """One thing to measure. `measure(quick, say)` takes a reading; `say` is for progress."""

    name: str
    unit: str
    measure: Callable[[bool, Say], Reading]


_known: dict[str, Benchmark] = {}


def benchmark(
    name: str, unit: str
) -> Callable[[Callable[[bool, Say], Reading]], Callable[[bool, Say], Reading]]:
    """Register the decorated function as the benchmark `name`, whose readings are in `unit`."""

    def register(measure: Callable[[bool, Say], Reading]) -> Callable[[bool, Say], Reading]:
        assert name not in _known, f"two benchmarks are called {name}"
        _known[name] = Benchmark(name, unit, measure)
        return measure

    return register


def select(names: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks that are called, or else whose name starts with, one of `names`.

    Without names, all.

    Raises `ConfigError` if one of `names` fits nothing.
    """
    for module in pkgutil.iter_modules(cases.__path__):
        importlib.import_module(f"{cases.__name__}.{module.name}")
    for name in names:
        if not any(known.startswith(name) for known in _known):
            raise ConfigError(f"no benchmark {name!r}; there are {', '.join(sorted(_known))}")
    whole = {name for name in names if name in _known}
    starts = tuple(name for name in names if name not in whole) or (() if names else ("",))
    wanted = (name for name in sorted(_known) if name in whole or name.startswith(starts))
    return [_known[name] for name in wanted]
