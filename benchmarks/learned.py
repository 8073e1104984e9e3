"""Models and updates that were really trained: random numbers compress otherwise."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.params import Params

_SITES, _STEPS, _BATCH, _LR, _ROUNDS = 2, 10, 16, 0.05, 3


def models(width: int) -> tuple[Params, Params, Params]:
    """Return the model before a round, after it, and one site's update; FedAvg, the third round.

    Two convolutions and two linear layers, the first of `width`; two sites with halves of the
    digits that scikit-learn ships, enlarged.
    """
    params = Params(_network(width).state_dict())
    before = params
    delta = params.zeros()
    for number in range(_ROUNDS):
        before = params
        deltas = [_train(width, params, site, 100 * number + site) for site in range(_SITES)]
        delta = deltas[0]
        mean = deltas[0]
        for other in deltas[1:]:
            mean = mean + other
        params = params + mean * (1 / _SITES)
    return before, params, delta


def _network(width: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(12544, width), nn.ReLU(), nn.Linear(width, 10),
    )  # fmt: skip


def _train(width: int, params: Params, site: int, seed: int) -> Params:
    """Return how some steps of SGD at a site move the model."""
    model = _network(width)
    model.load_state_dict(dict(params))
    descent = torch.optim.SGD(model.parameters(), lr=_LR, momentum=0.9)
    images, labels = _digits()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_STEPS):
        rows = site + _SITES * torch.randint(len(labels) // _SITES, (_BATCH,), generator=generator)
        descent.zero_grad()
        functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        descent.step()
    return Params(model.state_dict()) - params


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """Return images [rows, 3, 32, 32] and their labels."""
    from sklearn.datasets import load_digits

    shipped = load_digits()
    small = torch.from_numpy(shipped.images).float()[:, None] / 16
    large = functional.interpolate(small, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return large, torch.from_numpy(shipped.target)
