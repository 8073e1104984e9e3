"""Clipped sums of rows' gradients against rows taken one by one, and against Opacus's hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPLSTM
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import TaskFailed
from fedml.learning.ghosts import Outer, Units
from fedml.learning.rowwise import RowGradients
from fedml.privacy.mechanisms import MARGIN, clip_factors

torch.set_num_threads(1)

CLIP, ROWS, CLASSES, BROKEN = 0.3, 12, 3, 9
Make = Callable[[], nn.Module]


class Sentences(nn.Module):
    """Words, read by an LSTM."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 6, padding_idx=padding)
        self.reader = DPLSTM(6, 8, batch_first=True)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.reader(self.words(x))[0][:, -1])
        return out


class Attention(nn.Module):
    """A transformer's block; with `turned` its inner tensors come [sequence, rows, features]."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.turned, self.norm = turned, nn.LayerNorm(6)
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.wide, self.out = nn.Linear(6, 40), nn.Linear(40, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x.transpose(0, 1) if self.turned else x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        if self.turned:
            h, q, k, v = (part.transpose(0, 1) for part in (h, q, k, v))
        h = h + torch.softmax(q @ k.mT / 2, -1) @ v
        out: Tensor = self.out(functional.gelu(self.wide(h)).mean(1))
        return out


class Twice(nn.Module):
    """One layer used twice, with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.out = nn.Linear(7, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.again(torch.tanh(self.again(x)))) + x)
        return out


class Tied(nn.Module):
    """An embedding whose table is the output's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.mix(self.words(x).mean(1))))
        return out


class Borrowed(nn.Module):
    """Uses a layer's weight without calling the layer: no hook hears of that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(7, 7), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.tanh(self.first(x)) @ self.first.weight)
        return out


class Own(nn.Module):
    """A parameter of a module that is no known layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.randn(7)), nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(x * self.scale)
        return out


class Adapted(nn.Module):
    """A frozen layer beside two thin ones, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.out = nn.Linear(7, 9), nn.Linear(9, CLASSES)
        self.down, self.up = nn.Linear(7, 2, bias=False), nn.Linear(2, 9, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.relu(self.base(x) + self.up(self.down(x))))
        return out


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 16), nn.ReLU(inplace=True), nn.Linear(16, CLASSES))


def w1() -> nn.Module:
    """The benchmarks' W1, smaller, without its dropouts."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(54, 16), nn.ReLU(), nn.Linear(16, CLASSES),
    )  # fmt: skip


def convolutions() -> nn.Module:
    """Groups, strides, dilation, paddings, and norms."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", groups=4), nn.InstanceNorm2d(8, affine=True),
        nn.Conv2d(8, 4, (2, 3), dilation=2, padding=2, bias=False),
        nn.Conv2d(4, 64, (7, 5)), nn.Flatten(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def circular() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=(2, 1), padding_mode="circular"), nn.ReLU(),
        nn.Conv2d(4, 4, 2, padding="same", padding_mode="reflect"),
        nn.Flatten(), nn.Linear(480, CLASSES),
    )  # fmt: skip


def sequences() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, padding="same"), nn.GroupNorm(4, 8), nn.Tanh(),
        nn.Conv1d(8, 5, 4, stride=2, padding=1), nn.Flatten(), nn.Linear(20, CLASSES),
    )  # fmt: skip


def volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(2, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(108, CLASSES))


def half_frozen() -> nn.Module:
    net = perceptron()
    parameters = dict(net.named_parameters())
    parameters["0.bias"].requires_grad_(False)
    parameters["2.weight"].requires_grad_(False)
    return net


def images(count: int, size: int = 10) -> Tensor:
    return torch.randn(count, 3, size, size)


def words(count: int) -> Tensor:
    return torch.randint(0, 20, (count, 9))


NETS: dict[str, tuple[Make, Callable[[int], Tensor], bool]] = {
    "perceptron": (perceptron, lambda n: torch.randn(n, 7), True),
    "w1": (w1, images, True),
    "convolutions": (convolutions, images, True),
    "sequences": (sequences, lambda n: torch.randn(n, 4, 9), True),
    "volumes": (volumes, lambda n: torch.randn(n, 2, 4, 4, 4), True),
    "sentences": (Sentences, words, True),
    "padded sentences": (lambda: Sentences(0), words, True),
    "circular": (circular, images, True),
    "attention": (Attention, lambda n: torch.randn(n, 4, 6), True),
    "turned attention": (lambda: Attention(True), lambda n: torch.randn(n, 4, 6), True),
    "one layer twice": (Twice, lambda n: torch.randn(n, 7), True),
    "tied": (Tied, words, True),
    "half frozen": (half_frozen, lambda n: torch.randn(n, 7), True),
    "adapted": (Adapted, lambda n: torch.randn(n, 7), True),
    "borrowed weight": (Borrowed, lambda n: torch.randn(n, 7), False),
    "own parameter": (Own, lambda n: torch.randn(n, 7), False),
}


def loss(output: Tensor, target: Tensor) -> Tensor:
    found: Tensor = functional.cross_entropy(output, target)
    return found


def brittle(output: Tensor, target: Tensor) -> Tensor:
    """A loss that is not a number for the target `BROKEN`."""
    return loss(output, target % BROKEN) * torch.where(target == BROKEN, torch.nan, 1.0).mean()


def made(name: str) -> tuple[nn.Module, RowGradients, Tensor, Tensor]:
    torch.manual_seed(3)
    make, draw, _ = NETS[name]
    model = make()
    return model, RowGradients(model, loss, draw(5)), draw(ROWS), torch.randint(CLASSES, (ROWS,))


def clipped(
    rows: RowGradients, model: nn.Module, x: Tensor, y: Tensor, units: Units | None = None
) -> Tensor:
    sums: dict[Tensor, Tensor] = {
        p: torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters() if p.requires_grad
    }
    rows.add_clipped(x, y, CLIP, sums, units=units)
    return torch.cat([total.flatten() for total in sums.values()])


def by_autograd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return each row's gradient [rows, size], taken alone, in float64."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for row, target in zip(x, y, strict=True):
        parts = torch.autograd.grad([loss(model(row[None]), target[None])], parameters)
        found.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(found)


def cut(gradients: Tensor) -> Tensor:
    """Return the sum of rows, each scaled down to the clip."""
    norms = gradients.norm(dim=1)
    factors: Tensor = (CLIP * (1 - MARGIN) / norms).clamp(max=1.0)
    return factors @ gradients


@pytest.mark.parametrize("name", NETS)
def test_the_sum_is_that_of_rows_clipped_one_by_one(name: str) -> None:
    model, rows, x, y = made(name)
    right = cut(by_autograd(model, x, y))
    assert float((clipped(rows, model, x, y) - right).norm() / right.norm()) < 1e-6
    assert rows.is_layered is NETS[name][2]


BY_HOOKS = [  # which take the first dimension for the rows, know one padding, and train a pad's row
    name
    for name in NETS
    if NETS[name][2] and name not in ("turned attention", "circular", "padded sentences")
]


@pytest.mark.parametrize("name", BY_HOOKS)
def test_the_sum_is_that_of_opacus_hooks(name: str) -> None:
    model, rows, x, y = made(name)
    found = clipped(rows, model, x, y)
    other = NETS[name][0]()
    other.load_state_dict(model.state_dict())
    for module in other.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # hooks do not bear it
    wrapped = GradSampleModule(other, loss_reduction="sum")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        torch.autograd.backward([functional.cross_entropy(wrapped(x), y, reduction="sum")])
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    gradients = [p.grad_sample.flatten(1).double() for p in parameters]
    right = cut(torch.cat(gradients, 1))
    assert float((found - right).norm() / right.norm()) < 1e-6


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("blow", [1.0, 1e6])
def test_a_row_moves_the_sum_by_at_most_the_clip_whatever_its_form(name: str, blow: float) -> None:
    model, rows, x, y = made(name)
    if x.is_floating_point():
        x[4] *= blow
    whole, rest = torch.arange(ROWS), torch.tensor([n for n in range(ROWS) if n != 4])
    moved = clipped(rows, model, x[whole], y[whole]) - clipped(rows, model, x[rest], y[rest])
    assert float(moved.norm()) <= CLIP
    assert moved.any() or blow > 1  # a loss may saturate


def test_terms_that_cancel_do_not_hide_a_unit_s_norm() -> None:
    """Two steps of a sequence that nearly undo each other, far above what is left of them."""
    x = torch.randn(1, 1, 200) * 1e4
    taken = torch.cat([x, x * (1 + 1e-7)], 1)
    told = torch.cat([torch.full((1, 1, 200), 1e3), torch.full((1, 1, 200), -1e3)], 1)
    weight = nn.Parameter(torch.zeros(200, 200))
    ghost = Outer(taken, told, weight, None)
    sums: dict[Tensor, Tensor] = {weight: torch.zeros(200, 200, dtype=torch.float64)}
    factors = clip_factors(ghost.squares().sqrt(), CLIP)
    ghost.add(factors, slice(None), sums)
    assert float(sums[weight].norm()) <= CLIP


@pytest.mark.parametrize("name", ["perceptron", "w1", "attention", "sentences", "own parameter"])
def test_a_row_that_is_not_finite_counts_as_zero_whatever_its_form(name: str) -> None:
    model, _, x, y = made(name)
    rows = RowGradients(model, brittle, NETS[name][1](5))
    rest = torch.tensor([n for n in range(ROWS) if n != 4])
    right = clipped(rows, model, x[rest], y[rest])
    y[4] = BROKEN
    found = clipped(rows, model, x, y)
    assert bool(found.isfinite().all())
    assert float((found - right).norm() / right.norm()) < 1e-6


def test_an_input_that_a_later_layer_overwrites_is_noticed() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(7, 7), nn.Linear(7, CLASSES)
            self.rude = False

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(torch.tanh(self.first(x)))
            if self.rude:
                x.zero_()
            return out

    model = Overwrites()
    rows = RowGradients(model, loss, torch.randn(5, 7))
    assert rows.is_layered
    model.rude = True
    with pytest.raises(TaskFailed, match="Linear: its input was overwritten in place"):
        clipped(rows, model, torch.randn(ROWS, 7), torch.zeros(ROWS).long())
