"""How to deal one dataset out to pretended sites, for demonstrations and experiments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedml.errors import ConfigError


def dirichlet_label_skew(
    labels: Sequence[int] | npt.NDArray[np.int64], sites: int, alpha: float, seed: int
) -> list[npt.NDArray[np.int64]]:
    """Return each site's row indices: sites of equal size, each with its own mixture of labels.

    A site's mixture is drawn from a Dirichlet around the overall mixture, of concentration
    `alpha` for each label: 100 and all sites are alike, 0.1 and most see a single label. Sizes
    differ by at most one row; each row goes to one site. A label that has run out is no longer
    drawn, so the last sites take what is left.
    Source: Hsu, Qi & Brown 2019, arXiv:1909.06335, section 3.1, whose concentration is that of
    all labels together.
    """
    values, codes = np.unique(np.asarray(labels), return_inverse=True)
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha {alpha}: must be above 0; try 0.5")
    if not 1 <= sites <= len(codes):
        raise ConfigError(
            f"{len(codes)} rows cannot go to {sites} sites; lower the number of sites"
        )
    random = np.random.default_rng(seed)
    heaps = [list(random.permutation(np.flatnonzero(codes == code))) for code in range(len(values))]
    prior = np.bincount(codes) / len(codes)
    dealt = []
    for site in range(sites):
        size = len(codes) // sites + (site < len(codes) % sites)
        mixture = random.dirichlet(alpha * len(values) * prior)
        rows: list[int] = []
        while len(rows) < size:
            left = np.array([len(heap) for heap in heaps])
            chances = np.where(left > 0, mixture, 0.0)
            if chances.sum() <= 0:  # only labels that this site has no taste for remain
                chances = left / left.sum()
            wanted = random.multinomial(size - len(rows), chances / chances.sum())
            for heap, count in zip(heaps, np.minimum(wanted, left), strict=True):
                rows += [heap.pop() for _ in range(count)]
        dealt.append(np.sort(np.array(rows, dtype=np.int64)))
    return dealt
