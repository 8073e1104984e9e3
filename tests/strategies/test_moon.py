"""MOON against its formula, through the trainer that every site has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedml.errors import ConfigError, Contradiction, Refused
from fedml.learning.recipe import Rows
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Slots, Task, Update
from fedml.strategies import FedAvg, Moon, Strategy, check_model
from fedml.strategies.moon import Views
from tests.simulation.worlds import engine, plan

RECORD = Privacy("record", epsilon=2.0, delta=1e-5, rounds=3)
MU, TAU, LR = 3.0, 0.4, 0.2


@dataclass(frozen=True)
class Given:
    """A recipe of two classes around a model that the test gives."""

    model: Callable[[], nn.Module]
    labels: tuple[str, ...] = ("no", "yes")

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().double()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        return {"accuracy": (output.argmax(1) == target).double()}

    def read(self, path: Path) -> Rows:
        raise NotImplementedError

    def example(self, rows: int) -> Tensor:
        return torch.ones(rows, 4, dtype=torch.float64)


def hidden() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def some_rows() -> Rows:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Rows(x, (x[:, 0] > 0).long())


TRAINING = Training(lr=LR, steps=4)


def trained(
    strategy: Strategy,
    memory: Slots,
    *,
    model: Callable[[], nn.Module] = hidden,
    privacy: Privacy | None = None,
    training: Training = TRAINING,
) -> tuple[Update, Slots]:
    recipe = Given(model)
    state = strategy.start(Params(recipe.build().state_dict()))
    task = Task(TaskId("t"), RunId("r"), 1, SiteId("north"), "train", strategy.brief(state))
    trainer = Trainer(recipe, training, privacy or Privacy())
    return trainer.train(task, some_rows(), memory, seed=3, public_rows=20)


def apart() -> Params:
    """What a site ended with last time."""
    rng = torch.Generator().manual_seed(5)
    params = Params(Given(hidden).build().state_dict())
    return params.map(lambda b: b + torch.randn(b.shape, generator=rng, dtype=b.dtype))


def paper(last: Params) -> Params:
    """Algorithm 1's local training with equation 3 written out: the parameters at the end."""
    here, start, old = models = [hidden().double() for _ in range(3)]
    for model in models:
        model.load_state_dict(Given(hidden).build().state_dict())
    old.load_state_dict(dict(last))
    rows = some_rows()
    for _ in range(TRAINING.steps):
        z, z_g, z_p = (model[:4](rows.x) for model in (here, start, old))
        cosines = [(z * o).sum(1) / (z.norm(dim=1) * o.norm(dim=1)) for o in (z_g, z_p)]
        near, far = (torch.exp(cosine / TAU) for cosine in cosines)
        loss = nn.functional.cross_entropy(here(rows.x), rows.y)
        loss = loss - MU * torch.log(near / (near + far)).mean()
        grads = torch.autograd.grad(loss, list(here.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(here.parameters(), grads, strict=True):
                parameter.sub_(LR * grad)
    return Params(here.state_dict())


def test_it_is_equation_3_of_li_2021() -> None:
    update, kept = trained(Moon(MU, TAU), {"last": apart()})
    expected = paper(apart())
    assert (kept["last"] - expected).norm() < 1e-12
    assert (update.delta - (expected - Params(Given(hidden).build().state_dict()))).norm() < 1e-12
    plain, _ = trained(FedAvg(), {})
    assert (update.delta - plain.delta).norm() > 0.01


def test_without_the_term_and_at_a_new_site_it_is_fedavg_to_the_bit() -> None:
    plain, _ = trained(FedAvg(), {})
    for strategy, memory in ((Moon(0.0), {"last": apart()}), (Moon(MU), dict[str, Params]())):
        ours, _ = trained(strategy, memory)
        assert (ours.delta, ours.metrics) == (plain.delta, plain.metrics)
    brief = Moon(0.0).brief(Moon(0.0).start(apart()))
    assert Views().others(brief, {"last": apart()}) == ()  # and costs no more


def test_the_loss_that_is_told_is_the_recipes() -> None:
    one = replace(TRAINING, steps=1)  # whose loss is that of where all start
    plain, _ = trained(FedAvg(), {}, training=one)
    ours, _ = trained(Moon(MU), {"last": apart()}, training=one)
    assert ours.metrics == plain.metrics
    assert ours.delta != plain.delta


def test_dropout_is_in_the_trained_view_alone() -> None:
    def dropping() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 2))

    last = Params(Given(dropping).build().state_dict())
    one, _ = trained(Moon(MU), {"last": last}, model=dropping)
    plain, _ = trained(FedAvg(), {}, model=dropping)
    assert (one.delta - plain.delta).norm() < 1e-12  # both others see rows alike, so they cancel


def test_a_model_without_a_hidden_layer_is_refused_with_the_way_out() -> None:
    def line() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

    def frozen() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        model[0].requires_grad_(False)
        return model

    for model in (line, frozen):
        with pytest.raises(ConfigError, match=r"has 1 layer to train, .* use strategy=fedavg"):
            trained(Moon(), {}, model=model)
    told = r"a model of 1 layer \(it has 1.bias, 1.weight alone\): .* use strategy=fedavg"
    with pytest.raises(Contradiction, match=told):  # breast cancer's model is linear
        engine(plan(strategy=Moon()))
    check_model(Moon(), Params(hidden().state_dict()), 3)


def test_record_privacy_is_refused_by_the_plan_and_at_a_site() -> None:
    with pytest.raises(Contradiction, match=r"strategy Moon with record privacy: .* use strat"):
        plan(strategy=Moon(), privacy=RECORD)
    with pytest.raises(Refused, match=r"rule moon adds to the loss .* record privacy forbids"):
        trained(Moon(), {}, privacy=RECORD)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"moon.mu -1.0: must be 0 or more"):
        Moon(-1.0)
    with pytest.raises(ConfigError, match=r"moon.tau 0.0: must be above 0"):
        Moon(tau=0.0)
