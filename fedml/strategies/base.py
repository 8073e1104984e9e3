"""The site half of a federated algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fedml.params import Params
from fedml.protocol.tasks import Brief, Slots


class LocalRule(Protocol):
    """Site half of an algorithm: bends local gradients and reports what the server half needs."""

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return the gradient to step along, given the plain one at `params`."""

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Return (slots to report, memory to keep); `path` has `lr` and `steps` taken."""


class Plain:
    """Local SGD as it is."""

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return `grads` unchanged."""
        return grads

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report and keep nothing."""
        return {}, {}
