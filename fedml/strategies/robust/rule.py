"""What all robust rules share: settings, pre-steps, and a reduction that says who counted less.

A rule clips norms, takes its pre-steps, mixes updates by weights that follow from their inner
products, and makes one of the mixtures element by element. All but the last is a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedml.errors import ConfigError, MalformedUpdate
from fedml.protocol.messages import SiteId
from fedml.strategies.base import Aggregate, Reduction, check_setting
from fedml.strategies.robust import gram as grams
from fedml.strategies.robust.cohort import Held, Matrix, Vector
from fedml.strategies.robust.gram import STEPS, Step

LITTLE = 0.5  # of an even share; a site that counts less is named in the receipt


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What every robust rule has; as it stands, the mean of all sites with their norms clipped.

    Up to `f` sites of a cohort may lie. Norms are clipped to `clip` times their median, always.
    `before` lists pre-steps: arc, which clips the largest norms further, and nnm, which mixes
    each update with its nearest. Every site counts once, whatever weight it claims.
    """

    f: int = 1
    before: tuple[Step, ...] = ()
    clip: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", tuple(self.before))
        name = type(self).__name__
        check_setting(f"{name}.f", self.f)
        check_setting(f"{name}.clip", self.clip, open_=True)
        if odd := [step for step in self.before if step not in STEPS]:
            raise ConfigError(f"{name}.before {odd[0]!r}: use some of {', '.join(STEPS)}")
        if len(set(self.before)) < len(self.before):
            raise ConfigError(f"{name}.before {list(self.before)}: list each step once")

    @property
    def linear(self) -> bool:
        """False: it looks at single updates, so they cannot be hidden from it."""
        return False

    @property
    def least(self) -> int:
        """2f + 1: the honest must be more than the others."""
        return 2 * self.f + 1

    @property
    def compares(self) -> bool:
        """True if it needs more than norms of the inner products."""
        return "nnm" in self.before

    def even(self, weights: Vector) -> Vector:
        """Return each site's share if none is doubted, here the same; they add up to 1."""
        return np.full(len(weights), 1 / len(weights))

    def mix(self, gram: Matrix, even: Vector) -> Matrix:
        """Return the mixtures of n updates to go on with, [k, n], given their inner products."""
        return even[None, :]

    def fold(self, rows: Matrix) -> tuple[Vector, Vector]:
        """Return one vector of the mixtures' `rows`, and in how many elements each row counted."""
        return rows[0], np.ones(1)

    def start(self) -> Reduction:
        """Begin a round's reduction."""
        return _Running(self)


class _Running(Held):
    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self._rule = rule

    def _reduce(self) -> Aggregate:
        rule, cohort = self._rule, self._cohort
        if len(cohort) < rule.least:
            raise MalformedUpdate(
                f"{len(cohort)} updates, and {type(rule).__name__} with f {rule.f} needs "
                f"{rule.least}; raise cohort.quorum or lower f"
            )
        even = rule.even(cohort.weights)
        mixtures, notes = self._mixtures(even)
        counted = np.zeros(len(mixtures))
        untouched = np.array_equal(mixtures, np.eye(len(cohort)))

        def make(rows: Matrix) -> Vector:
            values, counts = rule.fold(rows if untouched else mixtures @ rows)
            counted[:] += counts
            return values

        parts = cohort.fold(make)
        damped = _damped(cohort.sites, counted @ mixtures, even, notes)
        weight = math.fsum(cohort.weights)
        return Aggregate(parts.pop(""), parts, weight, len(cohort), cohort.metrics(), damped)

    def _mixtures(self, even: Vector) -> tuple[Matrix, Mapping[int, str]]:
        """Return what is folded, as mixtures of the updates, and whose norms were clipped."""
        rule, cohort = self._rule, self._cohort
        gram = cohort.gram() if rule.compares else np.diag(cohort.squares())
        norms, mixtures, scales = grams.norms(gram), np.eye(len(cohort)), np.ones(len(cohort))
        for step in ("clip", *rule.before):
            match step:
                case "clip":
                    change = grams.clip(gram, rule.clip)
                case "arc":
                    change = grams.arc(gram, rule.f)
                case _:
                    change = grams.nnm(gram, rule.f)
            if step != "nnm":
                scales *= np.diagonal(change)
            mixtures, gram = change @ mixtures, change @ gram @ change.T
        notes = {
            k: f"its norm {norms[k]:.3g} was clipped to {scales[k] * norms[k]:.3g}"
            for k in range(len(cohort))
            if scales[k] < LITTLE
        }
        return rule.mix(gram, even) @ mixtures, notes


def _damped(
    sites: tuple[SiteId, ...], shares: Vector, even: Vector, notes: Mapping[int, str]
) -> Mapping[str, str]:
    """Return who counted less than half of an even share, with the reason.

    A share is how much of the aggregate is made of a site's numbers.
    """
    total = float(shares.sum())
    found = shares / total / even if total > 0 else np.ones(len(sites))
    return {
        site: f"{found[k]:.0%} of an even share: {notes.get(k, 'it differs from the others')}"
        for k, site in enumerate(sites)
        if found[k] < LITTLE
    }
