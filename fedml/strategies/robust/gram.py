"""What robust rules compute from inner products alone: O(n^2) numbers, whatever the model's size.

`gram` holds the inner products of n vectors, [n, n]. Steps and rules are linear in the vectors,
so a matrix of mixtures `m`, [k, n], stands for the k vectors `m @ x`, whose inner products are
`m @ gram @ m.T`.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from fedml.strategies.robust.cohort import Matrix, Vector

Step = Literal["arc", "nnm"]
STEPS: tuple[Step, ...] = get_args(Step)


def norms(gram: Matrix) -> Vector:
    """Return the vectors' norms."""
    return np.sqrt(np.maximum(np.diagonal(gram), 0.0))


def distances(gram: Matrix) -> Matrix:
    """Return squared distances between all vectors; from itself each is 0 away, exactly."""
    squares = np.diagonal(gram)
    found: Matrix = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def shortened(gram: Matrix, limit: float) -> Vector:
    """Return the factors that bring norms down to `limit`; never up."""
    found = norms(gram)
    return np.where(found > limit, limit / np.maximum(found, np.finfo(float).tiny), 1.0)


def clip(gram: Matrix, times: float) -> Matrix:
    """Return the mixtures that clip norms to `times` their median, which a minority cannot move.

    Where most send zeros, nothing is clipped.
    """
    limit = times * float(np.median(norms(gram)))
    return np.diag(shortened(gram, limit if limit > 0 else np.inf))


def arc(gram: Matrix, f: int) -> Matrix:
    """Return the mixtures that clip the 2 (f/n) (n - f) largest norms to the next one.

    Source: Allouah et al. 2024 (ARC), arXiv:2405.14432, algorithm 2.
    """
    n = len(gram)
    return np.diag(shortened(gram, float(np.sort(norms(gram))[n - 1 - 2 * f * (n - f) // n])))


def nnm(gram: Matrix, f: int) -> Matrix:
    """Return the mixtures that make of each vector the mean of its n - f nearest, itself too.

    Of equally near ones the first counts. Source: Allouah et al. 2023 (nearest neighbour
    mixing), arXiv:2302.01772, algorithm 1.
    """
    n = len(gram)
    nearest = np.argsort(distances(gram), axis=1, kind="stable")[:, : n - f]
    mixtures = np.zeros((n, n))
    np.put_along_axis(mixtures, nearest, 1.0 / (n - f), axis=1)
    return mixtures


def krum(gram: Matrix, f: int) -> Vector:
    """Return each vector's sum of squared distances from its n - f - 2 nearest others.

    Source: Blanchard et al. 2017 (Krum), arXiv:1703.02757, section 4.
    """
    near = np.sort(distances(gram), axis=1)[:, 1:]  # itself is first
    nearest = near[:, : max(1, len(gram) - f - 2)]  # 1: for the last that Bulyan chooses
    scores: Vector = nearest.sum(axis=1)
    return scores


def bulyan(gram: Matrix, f: int) -> list[int]:
    """Return the n - 2 f vectors that Krum chooses one after the other, in order of their rows.

    Source: El Mhamdi et al. 2018 (Bulyan), arXiv:1802.07927, section 4.
    """
    left, chosen = list(range(len(gram))), list[int]()
    while len(chosen) < len(gram) - 2 * f:
        scores = krum(gram[np.ix_(left, left)], f)
        chosen.append(left.pop(int(np.argmin(scores))))
    return sorted(chosen)


def far_from(gram: Matrix, weights: Vector) -> Vector:
    """Return the vectors' distances from their sum by `weights`."""
    squares = np.diagonal(gram) - 2 * (gram @ weights) + weights @ gram @ weights
    return np.sqrt(np.maximum(squares, 0.0))


def geometric_median(gram: Matrix, even: Vector, nu: float, iterations: int) -> Vector:
    """Return the weights of the point that has the least sum of distances, weighed by `even`.

    Source: Pillutla et al. 2019 (RFA), arXiv:1912.13445, algorithm 2: Weiszfeld's iterations,
    smoothed by `nu`. The first guess is zero: no change of the model.
    """
    weights = np.zeros(len(gram))
    for _ in range(iterations):
        pull = even / np.maximum(nu, far_from(gram, weights))
        weights = pull / pull.sum()
    return weights


def centred_clipping(gram: Matrix, tau: float, iterations: int) -> Vector:
    """Return the weights of v <- v + mean((x - v) min(1, tau / |x - v|)), v = 0 at first.

    With `tau` 0 the radius is in each iteration the median distance from v.
    Source: Karimireddy et al. 2021, arXiv:2012.10333, equation 3.
    """
    weights = np.zeros(len(gram))
    for _ in range(iterations):
        far = far_from(gram, weights)
        radius = tau or float(np.median(far))
        share = np.where(far > radius, radius / np.maximum(far, np.finfo(float).tiny), 1.0)
        weights = weights * (1 - share.mean()) + share / len(gram)
    return weights
