"""Federated k-means is Lloyd's algorithm on the pooled rows, whoever holds which."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fedml.errors import ConfigError, Contradiction
from fedml.params import Params
from fedml.rounds.compatibility import trial
from fedml.strategies import KMeans
from fedml.strategies.kmeans import Centroids
from tests.simulation import worlds
from tests.strategies.unlabelled import Clusters, fitted, holdings, moved, scaled

NAME = "1.centroids"


def lloyd(rows: Tensor, centroids: Tensor, rounds: int) -> Tensor:
    """The pooled algorithm, one centroid after the other; those without rows stay."""
    centroids = centroids.clone()
    for _ in range(rounds):
        nearest = (rows[:, None, :] - centroids).square().sum(2).argmin(1)
        for k in range(len(centroids)):
            if bool((nearest == k).any()):
                centroids[k] = rows[nearest == k].mean(0)
    return centroids


def test_it_is_lloyd_on_all_rows_in_every_round() -> None:
    start = Clusters().build().state_dict()[NAME]
    for rounds in (1, 2, 5, 12):
        found = fitted(KMeans(), Clusters(), rounds)[NAME]
        torch.testing.assert_close(found, lloyd(scaled(), start, rounds), rtol=0, atol=1e-9)
    assert not torch.equal(lloyd(scaled(), start, 5), lloyd(scaled(), start, 12))


def test_it_comes_to_the_centres_that_scikit_learn_finds() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    start = Clusters().build().state_dict()[NAME].numpy()
    model = cluster.KMeans(2, init=start, n_init=1, max_iter=300, tol=0, algorithm="lloyd")
    model.fit(scaled().numpy())
    found = fitted(KMeans(), Clusters(), 25)[NAME].numpy()
    np.testing.assert_allclose(found, model.cluster_centers_, atol=1e-9)
    alone = next(iter(holdings().values())).train.x
    apart = lloyd(next(Clusters().build().children())(alone), torch.tensor(start), 25).numpy()
    assert np.abs(apart - model.cluster_centers_).max() > 0.05  # so agreeing is no accident


def model(*points: float) -> tuple[Centroids, Params]:
    module = Centroids(len(points), 1).double()
    module.centroids.data = torch.tensor(points, dtype=torch.float64)[:, None]
    return module, Params(module.state_dict())


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_five_rows_at_two_sites_and_a_centroid_that_nobody_is_near() -> None:
    module, params = model(0.0, 10.0, 500.0)
    sites = {"a": column(1.0, 2.0), "b": column(9.0, 12.0, 3.0)}
    state = moved(KMeans(), KMeans().start(params), module, sites)
    torch.testing.assert_close(state.params["centroids"], column(2.0, 10.5, 500.0))


def test_a_share_of_less_than_half_a_row_is_noise_and_moves_nothing() -> None:
    """A masked sum's zero is a little more or less."""
    module, params = model(0.0, 10.0)
    strategy, state = KMeans(), KMeans().start(params)
    seen = moved(strategy, state, module, {"a": column(1.0, 9.0)})
    torch.testing.assert_close(seen.params["centroids"], column(1.0, 9.0))
    from fedml.strategies import Aggregate

    for share in (1e-9, -1e-9):
        delta = Params({"centroids": column(1e-9, 0.5)})
        total = Aggregate(delta, {"share": Params({"centroids": column(share, 0.5)})}, 100.0, 2)
        after = strategy.advance(state, total).params["centroids"]
        torch.testing.assert_close(after, column(0.0, 11.0))


def test_a_recipe_with_another_loss_is_told_what_is_needed() -> None:
    outcome = worlds.engine(replace(worlds.plan(), strategy=KMeans())).play()
    assert "kmeans needs a recipe whose loss is half the mean squared" in outcome.end.detail


def test_a_loss_with_no_curvature_is_told_so_too() -> None:
    class Far(Centroids):
        def forward(self, x: Tensor) -> Tensor:
            return 3.0 * self.centroids.sum() + x

    module = Far(2, 1).double()
    with pytest.raises(ConfigError, match="its slope is the same everywhere"):
        moved(KMeans(), KMeans().start(Params(module.state_dict())), module, {"a": column(1.0)})


def test_masks_take_it_and_privacy_does_not() -> None:
    trial(KMeans(), "secagg")
    with pytest.raises(Contradiction, match="exact numbers made of rows, which no noise hides"):
        trial(KMeans(), "record")
