"""The rule that asks a site which is known to be honest: FLTrust."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedml.errors import ConfigError, MalformedUpdate
from fedml.protocol.messages import SiteId, check_name
from fedml.strategies.base import Aggregate, Reduction
from fedml.strategies.robust.cohort import Held, Vector
from fedml.strategies.robust.rule import LITTLE


@dataclass(frozen=True, kw_only=True)
class FLTrust:
    """The mean of all updates, each as long as that of the site `root` and weighed by trust in it.

    The root's rows are few and known to be clean; its update g_0 says where to go. Trust in the
    update g_k is max(0, cos(g_k, g_0)):
        sum_k trust_k |g_0| / |g_k| g_k / sum_k trust_k,  over all sites k but the root.
    However many of these lie, none takes the model against the root's direction. Where nobody is
    trusted the aggregate is g_0 itself, where the paper has none; integers are the root's own.
    Source: Cao et al. 2021, arXiv:2012.13995, algorithm 2; its root is the server, see ADR 0024.
    """

    root: str = "root"

    def __post_init__(self) -> None:
        try:
            check_name("site", self.root)
        except ConfigError as error:
            raise ConfigError(f"FLTrust.root: {error}") from error

    @property
    def linear(self) -> bool:
        """False: it looks at single updates."""
        return False

    @property
    def least(self) -> int:
        """Two: the root, and one that is held against it."""
        return 2

    def start(self) -> Reduction:
        """Begin a round's reduction."""
        return _Running(SiteId(self.root))


class _Running(Held):
    def __init__(self, root: SiteId) -> None:
        super().__init__()
        self._root = root

    def _reduce(self) -> Aggregate:
        cohort, root = self._cohort, self._root
        if root not in cohort.sites or len(cohort) < 2:
            there = ", ".join(cohort.sites) or "nobody"
            raise MalformedUpdate(
                f"updates of {there}: FLTrust needs that of its root {root}, and another; see that "
                f"{root} takes part, or set strategy.reducer.root to a site that does"
            )
        place = cohort.sites.index(root)
        along, squares = cohort.against(place)
        trust, weights = _trust(along, np.sqrt(squares), place)
        parts = cohort.fold(lambda rows: weights @ rows, root)
        weight = math.fsum(cohort.weights)
        damped = _damped(cohort.sites, trust, place)
        return Aggregate(parts.pop(""), parts, weight, len(cohort), cohort.metrics(), damped)


def _trust(along: Vector, norms: Vector, root: int) -> tuple[Vector, Vector]:
    """Return trust in each update, and how often it goes into the aggregate.

    `along` are the inner products with the root's.
    """
    length = norms[root]
    both = norms * length
    cosines = np.divide(along, both, out=np.zeros_like(norms), where=both > 0)
    trust = np.clip(cosines, 0.0, 1.0)
    trust[root] = 0.0
    total = float(trust.sum())
    if not total > 0:
        return trust, np.eye(len(norms))[root]
    scales = np.divide(length, norms, out=np.zeros_like(norms), where=norms > 0)
    return trust, trust / total * scales


def _damped(sites: tuple[SiteId, ...], trust: Vector, root: int) -> dict[str, str]:
    """Return who is trusted less than half as much as the mean of all but the root."""
    total, even = float(trust.sum()), 1 / (len(sites) - 1)
    shares = trust / total / even if total > 0 else np.zeros(len(sites))
    by = f"by its angle to {sites[root]}"
    return {
        site: f"{shares[k]:.0%} of an even share: trust {trust[k]:.2f}, {by}"
        for k, site in enumerate(sites)
        if k != root and shares[k] < LITTLE
    }
