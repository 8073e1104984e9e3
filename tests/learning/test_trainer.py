from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedml import strategies
from fedml.errors import ConfigError, MalformedUpdate, Refused, TaskFailed
from fedml.learning.recipe import Rows
from fedml.learning.trainer import Trainer, batches
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Slots, Task

torch.set_num_threads(1)


@dataclass(frozen=True)
class Given:
    """A recipe of two classes around a model that the test gives."""

    model: Callable[[], nn.Module]
    labels: tuple[str, ...] = ("no", "yes")

    def build(self) -> nn.Module:
        return self.model()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = nn.functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        raise NotImplementedError

    def example(self, rows: int) -> Tensor:
        return torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def some_rows(count: int = 60) -> Rows:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(1))
    return Rows(x, (x[:, 0] > 0).long())


def task_for(recipe: Given, **brief: object) -> Task:
    params = Params(recipe.build().state_dict())
    made = Brief(params, **brief)  # type: ignore[arg-type]
    return Task(TaskId("t"), RunId("r"), 1, SiteId("north"), "train", made)


STEPS = Training(lr=0.1, steps=20, batch_size=16)


def test_the_same_inputs_give_the_same_bytes_and_another_seed_others() -> None:
    recipe = Given(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)))
    task, trainer = task_for(recipe), Trainer(recipe, STEPS, Privacy())
    digests = []
    for outer, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(outer)  # the caller's generator is neither used nor moved
        before = torch.get_rng_state()
        digests.append(trainer.train(task, some_rows(), {}, seed=seed)[0].delta.digest())
        assert torch.equal(before, torch.get_rng_state())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_plain_training_is_what_torchs_own_sgd_does(momentum: float, decay: float) -> None:
    recipe, rows = Given(small), some_rows()
    training = Training(lr=0.1, epochs=3, batch_size=16, momentum=momentum, weight_decay=decay)
    update, _ = Trainer(recipe, training, Privacy()).train(task_for(recipe), rows, {}, seed=2)

    model = small()
    start = Params(model.state_dict())
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum, weight_decay=decay)
    for batch in batches(len(rows), training, 2):
        sgd.zero_grad()
        torch.autograd.backward([recipe.loss(model(rows.x[batch]), rows.y[batch])])
        sgd.step()
    expected = Params(model.state_dict()) - start
    assert (update.delta - expected).norm() < 1e-5 * expected.norm()
    assert update.weight == len(rows)


def test_steps_and_epochs_cover_the_rows_as_they_say() -> None:
    def seen(**settings: int) -> list[int]:
        training = Training(lr=1.0, **settings)
        return [len(torch.arange(10)[batch]) for batch in batches(10, training, 0)]

    assert seen(epochs=2, batch_size=4) == [4, 4, 2, 4, 4, 2]
    assert seen(steps=4, batch_size=4) == [4, 4, 2, 4]
    assert seen(steps=3) == seen(epochs=3) == [10, 10, 10]
    assert seen(steps=2, batch_size=99) == [10, 10]
    one_pass = list(batches(10, Training(lr=1.0, epochs=1, batch_size=3), 0))
    rows = torch.cat([torch.arange(10)[batch] for batch in one_pass])
    assert sorted(rows.tolist()) == list(range(10))


class Half:
    """A rule that halves gradients and counts its calls in its memory."""

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        return grads * brief.settings["factor"]

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        assert path == {"lr": 0.1, "momentum": 0.0, "steps": 20.0}
        return {"seen": delta}, {"last": delta, **memory}


def test_the_strategys_site_half_bends_gradients_and_keeps_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedml.learning.descent.RULES", {**strategies.RULES, "half": Half()})
    recipe = Given(small)
    bent = task_for(recipe, rule="half", settings={"factor": 0.5})
    memory = {"old": bent.brief.params}
    update, kept = Trainer(recipe, STEPS, Privacy()).train(bent, some_rows(), memory, seed=1)
    half = Training(lr=0.05, steps=20, batch_size=16)
    plain, _ = Trainer(recipe, half, Privacy()).train(task_for(recipe), some_rows(), {}, seed=1)
    assert (update.delta - plain.delta).norm() < 1e-6
    assert update.slots["seen"] == update.delta
    assert kept.keys() == {"last", "old"}


def test_a_rule_this_site_lacks_is_refused_with_those_it_has() -> None:
    recipe = Given(small)
    task = task_for(recipe, rule="psychic")
    with pytest.raises(Refused, match=r"no local rule 'psychic' here; there are .*plain"):
        Trainer(recipe, STEPS, Privacy()).train(task, some_rows(), {}, seed=0)


def test_buffers_travel_and_frozen_tensors_stay() -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        model[0].requires_grad_(False)
        return model

    recipe = Given(build)
    task = task_for(recipe)
    training = Training(lr=0.1, steps=5, batch_size=16, weight_decay=0.1, momentum=0.9)
    update, _ = Trainer(recipe, training, Privacy()).train(task, some_rows(), {}, seed=0)
    assert int(update.delta["1.num_batches_tracked"]) == 5
    assert bool(update.delta["1.running_mean"].any())
    assert not update.delta["0.weight"].any() and bool(update.delta["2.weight"].any())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return out


def test_a_tensor_under_two_names_moves_once_and_stays_one() -> None:
    recipe = Given(Tied)
    update, _ = Trainer(recipe, STEPS, Privacy()).train(task_for(recipe), some_rows(), {}, seed=0)
    assert torch.equal(update.delta["first.weight"], update.delta["second.weight"])
    assert bool(update.delta["first.weight"].any())


def test_training_that_diverges_names_the_step_and_the_way_out() -> None:
    recipe = Given(lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)))
    hot = Training(lr=1e12, steps=30)
    with pytest.raises(TaskFailed, match=r"at step \d+ of 30; lower training\.lr"):
        Trainer(recipe, hot, Privacy()).train(task_for(recipe), some_rows(), {}, seed=0)


def test_parameters_of_another_model_are_malformed() -> None:
    other = Given(lambda: nn.Linear(4, 2))
    with pytest.raises(MalformedUpdate, match="names differ"):
        Trainer(Given(small), STEPS, Privacy()).train(task_for(other), some_rows(), {}, seed=0)


def test_rows_that_do_not_fit_the_model_fail_the_task_in_one_line() -> None:
    rows, recipe = Rows(torch.zeros(5, 3), torch.zeros(5).long()), Given(small)
    with pytest.raises(TaskFailed, match="task t: mat1 and mat2") as caught:
        Trainer(recipe, STEPS, Privacy()).train(task_for(recipe), rows, {}, seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [1, 2])
def test_a_site_with_one_class_or_one_row_trains(count: int) -> None:
    rows, recipe = Rows(torch.ones(count, 4), torch.ones(count).long()), Given(small)
    update, _ = Trainer(recipe, STEPS, Privacy()).train(task_for(recipe), rows, {}, seed=0)
    assert update.delta.is_finite() and update.weight == count


def test_a_site_with_no_rows_is_told_so() -> None:
    rows, recipe = Rows(torch.ones(0, 4), torch.ones(0).long()), Given(small)
    with pytest.raises(ConfigError, match="no rows to train on"):
        Trainer(recipe, STEPS, Privacy()).train(task_for(recipe), rows, {}, seed=0)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    recipe = Given(lambda: nn.Linear(4, 2).requires_grad_(False))
    with pytest.raises(ConfigError, match="nothing to train"):
        Trainer(recipe, STEPS, Privacy()).train(task_for(recipe), some_rows(), {}, seed=0)


def test_under_site_central_a_whole_update_is_bounded_and_says_nothing_else() -> None:
    """However many rows, and however steep: a public norm, weight 1, no metric, no counter."""
    recipe = Given(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    bound = Privacy("site_central", 3.0, 1e-5, clip=0.25)
    trainer = Trainer(recipe, Training(lr=100.0, steps=3), bound)
    update, _ = trainer.train(task_for(recipe), some_rows(), {}, seed=0)
    assert 0.2 < update.delta.norm() <= 0.25
    assert (update.weight, update.metrics) == (1.0, {})
    assert int(update.delta["1.num_batches_tracked"]) == 0
    gentle = Trainer(Given(small), Training(lr=1e-3, steps=1), bound)
    little, _ = gentle.train(task_for(Given(small)), some_rows(), {}, seed=0)
    assert 0 < little.delta.norm() < 0.01  # what is small is not blown up


def test_under_site_central_a_rule_that_reports_more_is_refused() -> None:
    recipe = Given(small)
    trainer = Trainer(recipe, Training(lr=0.1, steps=1), Privacy("site_central", 3.0, 1e-5))
    with pytest.raises(Refused, match="beside the delta, which the clip of a whole site's"):
        trainer.train(task_for(recipe, rule="fednova"), some_rows(), {}, seed=0)
