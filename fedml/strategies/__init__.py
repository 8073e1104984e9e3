"""Federated algorithms: the site halves, by the name a brief calls them."""

from __future__ import annotations

from collections.abc import Mapping

from fedml.strategies.base import LocalRule, Plain

RULES: Mapping[str, LocalRule] = {"plain": Plain()}

__all__ = ["RULES", "LocalRule", "Plain"]
