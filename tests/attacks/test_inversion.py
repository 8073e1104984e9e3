"""Reading rows back from gradients: what works without differential privacy, and not with it.

For a first layer y = W x + b, the gradients of a neuron that one row alone wakes give the row
away: x = dL/dW_k / dL/db_k. Sources: Phong et al. 2018, IEEE TIFS 13(5), section 3; Geiping et al.
2020, arXiv:2003.14053, proposition 3.1. The attacker is the coordinator: it sees what sites send,
and the model is of its choice. The same attack runs with the defence on and off.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task, Update
from fedml.strategies import WeightedMean

torch.set_num_threads(1)

NEURONS, CLASSES = 1024, 10
OPEN = Privacy()
PRIVATE = Privacy("record", epsilon=8.0, delta=1e-5, clip=1.0, rounds=20)
READ = 0.99  # cosine from which on an image counts as read
NEAR = 0.9  # and from which on a defence would have to be ashamed


class Images:
    """Digits of 8 x 8 pixels, and a network whose first layer is fully connected."""

    labels = tuple("0123456789")

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, NEURONS), nn.ReLU(), nn.Linear(NEURONS, CLASSES))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = nn.functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        return {}

    def read(self, path: Path) -> Rows:
        raise ConfigError(str(path))

    def example(self, rows: int) -> Tensor:
        return torch.rand(rows, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


@cache
def digits(start: int, count: int) -> Rows:
    x, y = load_digits(return_X_y=True)
    taken = slice(start, start + count)
    return Rows(torch.tensor(x[taken] / 8 - 1).float(), torch.tensor(y[taken]).long())


def update(params: Params, rows: Rows, privacy: Privacy, site: str = "s") -> Update:
    """Return what a site sends after one step over its rows."""
    task = Task(TaskId("t"), RunId("r"), 1, SiteId(site), "train", Brief(params))
    trainer = Trainer(Images(), Training(lr=1.0, steps=1), privacy)
    return trainer.train(task, rows, {}, seed=0, public_rows=max(len(rows), 1))[0]


def likeness(delta: Params, rows: Rows) -> Tensor:
    """Return, for each row, the best cosine of what the attacker reads off any neuron."""
    weights, biases = delta["0.weight"], delta["0.bias"]
    awake = biases.abs() > 1e-12 * biases.abs().max()
    found = nn.functional.normalize(weights[awake] / biases[awake, None], dim=1)
    true = nn.functional.normalize(rows.x, dim=1)
    best: Tensor = (true @ found.T).max(dim=1).values
    return best


def honest() -> Params:
    return Params(Images().build().state_dict())


@pytest.mark.parametrize("batch", [1, 8])
def test_inversion_reads_every_image_of_a_batch_without_privacy(batch: int) -> None:
    rows = digits(0, batch)
    assert bool((likeness(update(honest(), rows, OPEN).delta, rows) > READ).all())


@pytest.mark.parametrize("batch", [1, 8])
def test_inversion_reads_no_image_under_record_privacy(batch: int) -> None:
    rows = digits(0, batch)
    for _ in range(5):
        assert not bool((likeness(update(honest(), rows, PRIVATE).delta, rows) > NEAR).any())


def test_inversion_reads_a_part_of_the_images_even_from_a_sum_over_sites() -> None:
    """Secure aggregation makes it harder, and does not stop it."""
    everyone, total = digits(0, 40), summed(honest(), OPEN, each=8)
    read = int((likeness(total, everyone) > READ).sum())
    assert 0 < read < 40


def summed(params: Params, privacy: Privacy, *, each: int) -> Params:
    """Return the sum over five sites: all that secure aggregation would let the attacker see."""
    reduction = WeightedMean().start()
    for number in range(5):
        reduction.add(update(params, digits(each * number, each), privacy, f"s{number}"))
    return reduction.result().delta


def amplifying(rows: Rows) -> Params:
    """Return a model whose first neuron wakes for the brightest row alone, and shouts.

    "Trap weights" in front (Boenisch et al. 2021, arXiv:2112.02918), an amplifier behind, as in
    Wen et al. 2022, arXiv:2202.00580: the row's gradient drowns all the others in any sum.
    """
    params = honest()
    brightness = rows.x.sum(dim=1)
    second, first = brightness.sort().values[-2:]
    params["0.weight"].zero_()
    params["0.bias"].fill_(-1.0)  # all others sleep
    params["0.weight"][0].fill_(1.0)
    params["0.bias"][0] = -float(first + second) / 2
    params["2.weight"][:, 0] = torch.linspace(-1e3, 1e3, CLASSES)
    return params


def test_a_gradient_amplifying_model_reads_a_row_through_any_sum_and_is_stopped_by_dp_alone() -> (
    None
):
    """Secure aggregation is no defence: the attack reads the sum. Clipping and noise are."""
    everyone = digits(0, 200)
    brightest = everyone.take([int(everyone.x.sum(dim=1).argmax())])
    model = amplifying(everyone)
    assert float(likeness(summed(model, OPEN, each=40), brightest)) > READ
    for _ in range(3):
        assert float(likeness(summed(model, PRIVATE, each=40), brightest).abs()) < NEAR


def test_noise_without_clipping_would_not_stop_a_gradient_amplifying_model() -> None:
    """It outshouts the noise that a clipped row drowns in; so it is the clip that must hold."""
    everyone = digits(0, 200)
    brightest = everyone.take([int(everyone.x.sum(dim=1).argmax())])
    bare = summed(amplifying(everyone), OPEN, each=40)
    noise = summed(honest(), Privacy("record", 8.0, 1e-5, clip=1e-9, rounds=20), each=40)
    shaken = bare.zip(noise, lambda signal, shake: signal + shake * (PRIVATE.clip / 1e-9))
    assert float(likeness(shaken, brightest)) > READ
