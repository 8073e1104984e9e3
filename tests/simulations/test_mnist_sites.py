"""MNIST on 1,000 devices as FedProx deals it, and McMahan et al.'s CNN."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedml.errors import ConfigError
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from simulations.mnist_1000.data import PowerLaw
from simulations.mnist_1000.recipe import Linear
from simulations.mnist_cnn.recipe import Convolutional
from tests.simulations.data import needs

PLACE = "mnist/train-images-idx3-ubyte.gz"


def dealt(seed: int, sites: int = 1000) -> dict[SiteId, Holding]:
    return dict(PowerLaw(sites, seed).deal(Linear(), None))


@needs(PLACE)
def test_devices_have_two_digits_each_and_sizes_by_a_power_law() -> None:
    """The paper's table 1 has 1,000 devices, 69,035 samples, 69 on average, deviation 106."""
    devices = list(dealt(0).values())
    labels = [torch.cat([one.train.y, one.held_out.y]) for one in devices]
    for number, own in enumerate(labels):
        assert set(own.tolist()) == {number % 10, (number + 1) % 10}
    sizes = torch.tensor([len(own) for own in labels], dtype=torch.float64)
    assert len(sizes) == 1000 and 68_000 < float(sizes.sum()) <= 70_000
    assert float(sizes.min()) >= 10 and 80 < float(sizes.std()) < 250
    assert float(sizes.median()) < 0.6 * float(sizes.mean())
    for one in devices:
        whole = len(one.train) + len(one.held_out)
        assert len(one.train) == int(0.9 * whole)


@needs(PLACE)
def test_no_image_goes_to_two_devices() -> None:
    weights = torch.randn(784, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    marks = torch.cat(
        [
            part.x.double() @ weights
            for one in dealt(1).values()
            for part in (one.train, one.held_out)
        ]
    )
    assert len(marks.unique()) > 0.999 * len(marks)  # MNIST itself repeats hardly an image


@needs(PLACE)
def test_a_seed_decides_sizes_and_rows() -> None:
    one, again, other = (dealt(seed, 100) for seed in (1, 1, 2))
    assert all(torch.equal(one[site].train.x, again[site].train.x) for site in one)
    assert [len(a.train) for a in one.values()] != [len(a.train) for a in other.values()]


@pytest.mark.parametrize("sites", [0, 15, 6000])
def test_impossible_numbers_of_devices_are_refused(sites: int) -> None:
    with pytest.raises(ConfigError, match=f"{sites} sites: give a multiple of ten"):
        PowerLaw(sites)


def test_the_cnn_is_the_paper_s() -> None:
    model = Convolutional().build()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_663_370
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size) for c in convolutions] == [(32, (5, 5)), (64, (5, 5))]
    dense = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in dense] == [512, 10]


def test_pixels_reach_the_models_as_shares_of_white() -> None:
    bytes_ = torch.tensor([[0, 255, 51] + [0] * 781], dtype=torch.uint8)
    for recipe in (Convolutional(), Linear()):
        scaled = recipe.build().get_submodule("0")(bytes_).flatten()
        assert scaled[:3].tolist() == [0.0, 1.0, pytest.approx(0.2)]
