"""Faults built into private training, in both of its engines: what the tests' attacks must find."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedml.learning import private, private_cohort

_NOTHING = 1e-9  # of the noise that was accounted for: none, in float32


def scale(patch: pytest.MonkeyPatch, *, noise: float = 1.0, clip: float = 1.0) -> None:
    """Let sites clip at `clip` times the norm, and add `noise` times the noise, of their terms.

    Ledger, metrics and claims stay as they are, as with a fault of the engine's own.
    """
    step: Any = private.PrivateGradient.__init__
    cohort: Any = private_cohort.train_privately
    noise = noise or _NOTHING

    def changed(event: Any) -> Any:
        return replace(event, noise=event.noise * noise / clip)

    def init(self: private.PrivateGradient, *args: Any, **kept: Any) -> None:
        step(self, *args, **{**kept, "event": changed(kept["event"]), "clip": kept["clip"] * clip})

    def train(*args: Any) -> Any:
        *first, releases, norm = args
        return cohort(
            *first, [replace(one, event=changed(one.event)) for one in releases], norm * clip
        )

    patch.setattr(private.PrivateGradient, "__init__", init)
    patch.setattr("fedml.simulation.executors.vectorised.train_privately", train)
