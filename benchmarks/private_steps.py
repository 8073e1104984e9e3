"""One private training step beside a plain one, and beside Opacus's: the same net, rows and batch.

`python -m benchmarks.private_steps NET STEP COUNT` prints how many bytes COUNT of STEP take beside
net and rows.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.workloads import W1
from fedml import pages
from fedml.learning.descent import Descent
from fedml.learning.private import PrivateGradient
from fedml.learning.recipe import Rows
from fedml.params import Params
from fedml.privacy.accounting import SampledGaussian
from fedml.protocol.messages import Training
from fedml.protocol.tasks import Brief

BATCH, ROWS, NOISE, CLIP, LR = 64, 6400, 1.0, 1.0, 0.01
_KEPT = 2**28  # bytes that a process may keep of what it frees, whoever's step it is
Step = Callable[[], None]


class Net:
    """A recipe of synthetic rows: the multilayer perceptron 784-256-128-10, or W1's network."""

    labels = tuple(map(str, range(10)))

    def __init__(self, name: str) -> None:
        self.name = name
        self.shape = {"mlp": (784,), "cnn": W1.shape, "tiny-mlp": (4,), "tiny-cnn": (3, 6, 6)}[name]

    def build(self) -> nn.Module:
        """Return the net, the same each time."""
        torch.manual_seed(0)
        match self.name:
            case "cnn":
                return W1.model()
            case "tiny-cnn":
                layers = nn.Conv2d(3, 2, 3), nn.MaxPool2d(2), nn.Dropout(0.5), nn.Flatten()
                return nn.Sequential(*layers, nn.Linear(8, 10))
            case "tiny-mlp":
                return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 10))
            case _:
                pass
        return nn.Sequential(
            nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )  # fmt: skip

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Refuse: rows are made."""
        raise NotImplementedError(f"{path}: this recipe reads no files")

    def example(self, rows: int) -> Tensor:
        """Return rows like those that are trained on."""
        return torch.randn(rows, *self.shape, generator=torch.Generator().manual_seed(1))

    def rows(self) -> Rows:
        """Return what all steps draw their batches from."""
        return Rows(self.example(ROWS), torch.arange(ROWS) % 10)


def plain(net: Net, rows: Rows) -> Step:
    """SGD as torch has it, on batches of fixed size."""
    model = net.build()
    return _stepping(net, rows, model, torch.optim.SGD(model.parameters(), lr=LR))


def _stepping(net: Net, rows: Rows, model: nn.Module, optimiser: torch.optim.Optimizer) -> Step:
    """Return what takes a step on a batch of fixed size."""

    def step() -> None:
        batch = torch.randint(len(rows), (BATCH,))
        optimiser.zero_grad()
        torch.autograd.backward([net.loss(model(rows.x[batch]), rows.y[batch])])
        optimiser.step()

    return step


def ours(net: Net, rows: Rows) -> Step:
    """All that a site does: sample, clip, noise from AES, update."""
    model = net.build()
    brief = Brief(Params(model.state_dict()))
    descent = Descent(model, brief, {}, Training(lr=LR, steps=1))
    event = SampledGaussian(BATCH / ROWS, NOISE, 1)
    gradient = PrivateGradient(net, descent, rows, event=event, clip=CLIP, public_rows=ROWS)

    def step() -> None:
        gradient.fill()
        descent.step()

    return step


def hooks(net: Net, rows: Rows) -> Step:
    """Opacus: every row's gradient written down; noise from torch's generator."""
    from opacus.grad_sample import GradSampleModule  # seconds, which the others need not wait
    from opacus.optimizers import DPOptimizer

    model = GradSampleModule(net.build(), loss_reduction="mean")
    optimiser = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=LR),
        noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=BATCH,
    )  # fmt: skip
    return _stepping(net, rows, model, optimiser)


def ghost(net: Net, rows: Rows) -> Step:
    """Opacus: ghost norms and a second backward pass; noise from torch's generator."""
    from opacus import PrivacyEngine

    model = net.build()
    made = PrivacyEngine().make_private(
        module=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR),
        criterion=nn.CrossEntropyLoss(), noise_multiplier=NOISE, max_grad_norm=CLIP,
        data_loader=DataLoader(TensorDataset(rows.x, rows.y), BATCH), poisson_sampling=False,
        grad_sample_mode="ghost",
    )  # fmt: skip
    wrapped, optimiser, criterion = made[0], made[1], made[2]

    def step() -> None:
        batch = torch.randint(len(rows), (BATCH,))
        optimiser.zero_grad()
        criterion(wrapped(rows.x[batch]), rows.y[batch]).backward()
        optimiser.step()

    return step


STEPS: Mapping[str, Callable[[Net, Rows], Step]] = {
    "plain": plain, "ours": ours, "hooks": hooks, "ghost": ghost,
}  # fmt: skip


def race(name: str, turns: int, steps_in_a_row: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each kind of step, by turns, on one thread."""
    _settle()
    net = Net(name)
    rows = net.rows()
    steps = {kind: make(net, rows) for kind, make in STEPS.items()}
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for turn in range(-1, turns):  # the first warms up
        for kind, step in steps.items():
            for number in range(-1, steps_in_a_row):  # one step finds its caches as it leaves them
                begun = time.thread_time()
                step()
                if min(turn, number) >= 0:
                    times[kind].append(time.thread_time() - begun)
    return times


def weigh(name: str, kind: str, count: int) -> int:
    """Return by how many bytes this process grew, at its peak, for `count` steps."""
    _settle()
    net = Net(name)
    rows = net.rows()
    STEPS[kind](Net(f"tiny-{name}"), Net(f"tiny-{name}").rows())()  # code that is loaded late
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    step = STEPS[kind](net, rows)
    for _ in range(count):
        step()
    return _status("VmHWM") - before


def _settle() -> None:
    warnings.filterwarnings("ignore", module="opacus|torch")
    warnings.filterwarnings("ignore", message="Full backward hook")  # of Opacus
    torch.set_num_threads(1)
    pages.keep_freed(_KEPT)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    print(weigh(sys.argv[1], sys.argv[2], int(sys.argv[3])))
