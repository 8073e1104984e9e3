"""Federated PCA is PCA of the pooled rows, by moments in one round or by iteration in many."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedml.errors import ConfigError, Contradiction
from fedml.params import Params
from fedml.rounds.compatibility import trial
from fedml.strategies import PCA
from tests.strategies.unlabelled import Components, fitted, moved, scaled


def pooled() -> tuple[Tensor, Tensor]:
    """The first two components of all rows, by singular values, and their mean."""
    rows = scaled()
    mean = rows.mean(0)
    return torch.linalg.svd(rows - mean, full_matrices=False).Vh[:2], mean


def apart(found: Tensor, wanted: Tensor) -> float:
    """How far rows are from others, up to their signs."""
    signs = (found * wanted).sum(1, keepdim=True).sign()
    return float((found * signs - wanted).abs().max())


@pytest.mark.parametrize(("strategy", "rounds"), [(PCA(), 1), (PCA(), 2), (PCA(columns=0), 40)])
def test_it_is_that_of_all_rows(strategy: PCA, rounds: int) -> None:
    model, (components, mean) = fitted(strategy, Components(), rounds), pooled()
    assert apart(model["1.weight"], components) < 1e-8
    torch.testing.assert_close(model["1.bias"], -model["1.weight"] @ mean, rtol=0, atol=1e-8)
    best = model["1.weight"].abs().max(1).values
    assert torch.equal(model["1.weight"].max(1).values, best)  # the sign is told


def test_scikit_learn_finds_the_same() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    model = decomposition.PCA(2).fit(scaled().numpy())
    found = fitted(PCA(), Components(), 1)
    assert apart(found["1.weight"], torch.from_numpy(model.components_)) < 1e-8
    ours = scaled() @ found["1.weight"].T + found["1.bias"]
    theirs = model.transform(scaled().numpy())
    np.testing.assert_allclose(np.abs(ours.numpy()), np.abs(theirs), atol=1e-7)


def layer(columns: int, components: int, *, zero: bool = False) -> tuple[nn.Module, Params]:
    torch.manual_seed(0)
    module = nn.Linear(columns, components).double()
    if zero:
        nn.init.zeros_(module.weight)
    return module, Params(module.state_dict())


def test_four_rows_at_two_sites_whose_answer_is_known() -> None:
    """On a line of slope 3/4 through (1, 2)."""
    line = torch.tensor([[1.0, 2.0]]) + torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]) * torch.tensor(
        [[0.8, 0.6]]
    )
    sites = {"a": line[:1].double(), "b": line[1:].double()}
    for strategy in (PCA(), PCA(columns=0)):
        module, params = layer(2, 1)
        state = strategy.start(params)
        for _ in range(3):
            state = moved(strategy, state, module, sites)
        wanted = torch.tensor([[0.8, 0.6]]).double()
        torch.testing.assert_close(state.params["weight"], wanted, rtol=0, atol=1e-6)
        torch.testing.assert_close(
            state.params["bias"], torch.tensor([-2.0]).double(), atol=1e-6, rtol=0
        )


def spectrum(columns: int = 12) -> Tensor:
    """Rows whose covariance has the eigenvalues 4, 3.9, 1, 1/4, ... along fixed directions."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator).double()).Q
    rows = torch.randn(500, columns, generator=generator).double()
    rows = torch.linalg.qr(rows - rows.mean(0)).Q * 500**0.5
    sizes = torch.tensor([4.0, 3.9, *(4.0**-k for k in range(columns - 2))]).double().sqrt()
    found: Tensor = rows * sizes @ basis + 5.0
    return found


@pytest.mark.parametrize("zero", [False, True])
def test_iteration_comes_nearer_by_the_ratio_of_eigenvalues(zero: bool) -> None:
    """Though two columns are always the same, where a start of unit vectors would look for ever."""
    rows, strategy = torch.cat([torch.ones(500, 2).double(), spectrum()], 1), PCA(columns=0)
    module, params = layer(14, 2, zero=zero)
    state = strategy.start(params)
    wanted = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:2]
    errors = []
    for _ in range(12):
        state = moved(strategy, state, module, {"a": rows[:100], "b": rows[100:]})
        found = state.params["weight"]
        torch.testing.assert_close(found @ found.T, torch.eye(2).double())
        errors.append(float((found - found @ wanted.T @ wanted).norm()))  # out of the plane
    shrunk = (errors[9] / errors[3]) ** (1 / 6)
    assert shrunk == pytest.approx(1 / 3.9, rel=0.1)
    assert apart(state.params["weight"], wanted) < 1e-4


def test_what_is_not_one_linear_layer_is_told_so() -> None:
    for tensors in (
        {"w": torch.zeros(3)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(3)},
        {"a": torch.zeros(3, 2), "b": torch.zeros(3)},
        {"a": torch.zeros(2, 3), "b": torch.zeros(2), "c": torch.zeros(2)},
    ):
        with pytest.raises(ConfigError, match="pca needs a model that is one linear layer"):
            PCA().start(Params(tensors))


@pytest.mark.parametrize("bend", [torch.tanh, torch.relu])
def test_outputs_that_are_not_linear_are_told_so(bend: Callable[[Tensor], Tensor]) -> None:
    class Bent(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return bend(super().forward(x))

    module = Bent(3, 2).double()
    with pytest.raises(ConfigError, match="its outputs are not W x"):
        moved(
            PCA(),
            PCA().start(Params(module.state_dict())),
            module,
            {"a": torch.ones(4, 3).double()},
        )


def test_masks_take_it_and_privacy_does_not() -> None:
    trial(PCA(), "secagg")
    with pytest.raises(Contradiction, match="exact numbers made of rows, which no noise hides"):
        trial(PCA(), "patient")
    with pytest.raises(ConfigError, match=r"pca\.columns -1"):
        PCA(columns=-1)
