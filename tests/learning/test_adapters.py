"""Adapters beside a frozen model: what is trained, what travels, and what a release holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fedml.errors import ConfigError
from fedml.learning.adapters import LowRank, adapt, merge
from fedml.learning.rowwise import RowGradients
from fedml.learning.trainer import Trainer
from fedml.params import Params, decode
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.secagg import Secagg
from fedml.protocol.tasks import Brief, Task
from fedml.releases.bundle import build
from fedml.releases.manifest import MODEL, WEIGHTS
from fedml.releases.session import Session
from fedml.rounds import Candidate, Evaluation, Plan, Run
from fedml.simulation.engine import Engine, statuses
from fedml.simulation.executors.base import MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import Scaffold
from tests.bundles import facts
from tests.simulation.worlds import Deep, holdings, plan

ADAPTERS = ["1.down.weight", "1.up.weight"]
HEAD = ["3.bias", "3.weight"]


def digest(model: nn.Module) -> str:
    return Params(model.state_dict()).digest()


def base() -> nn.Module:
    return Deep().build()


class Adapted(Deep):
    """A pretrained layer with an adapter, and a head that is trained as it is."""

    def build(self) -> nn.Module:
        model = super().build()
        return adapt(model, ["1"], frozen=digest(base()), rank=2, alpha=8.0, whole=["3"])


def finished(a_plan: Plan, make: MakeExecutor = Inline) -> Candidate:
    recipe = Adapted()
    torch.manual_seed(0)
    run = Run.begin(RunId("simulation"), a_plan, Params(recipe.build().state_dict()))
    executor = make(a_plan, recipe, holdings(), Memory())
    candidate = Engine(run, executor, statuses(a_plan, holdings())).play().candidate
    assert candidate is not None
    return candidate


def test_it_is_equation_3_of_hu_2021_and_trains_a_and_b_alone() -> None:
    layer = nn.Linear(3, 4).double()
    low = LowRank(layer, rank=2, alpha=6.0)
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(low(x), layer(x))  # B is zero
    b = torch.randn(4, 2, dtype=torch.float64)
    with torch.no_grad():
        low.up.weight.copy_(b)
    w, a = layer.weight.detach(), low.down.weight.detach()
    torch.testing.assert_close(low(x), x @ (w + 6.0 / 2 * b @ a).T + layer.bias)
    low(x).square().sum().backward()
    told = 2 * low(x).detach()
    torch.testing.assert_close(low.up.weight.grad, told.T @ (x @ a.T) * 3)
    torch.testing.assert_close(low.down.weight.grad, (told @ b).T @ x * 3)
    assert dict(low.named_parameters()).keys() == {"down.weight", "up.weight"}


def test_what_is_frozen_is_in_no_state_and_answers_as_before() -> None:
    model, plain = Adapted().build(), base()
    assert sorted(model.state_dict()) == sorted([*ADAPTERS, *HEAD])
    x = Adapted().example(6)
    torch.testing.assert_close(model(x), plain(x))
    whole = Params(plain.state_dict()).layout.bytes
    assert Params(model.state_dict()).layout.bytes < whole


def test_frozen_buffers_travel_no_more_and_those_of_layers_that_are_trained_do() -> None:
    class Counts(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 3)
            self.register_buffer("seen", torch.zeros(1))

    model = nn.Sequential(nn.Linear(3, 3), Counts(), Counts())
    adapt(model, ["0"], frozen=digest(model), whole=["2"])
    adapters = {"0.down.weight", "0.up.weight"}
    assert model.state_dict().keys() == {*adapters, "2.weight", "2.bias", "2.seen"}
    assert dict(model.named_buffers()).keys() > {"1.weight", "1.bias", "1.seen"}


@pytest.mark.parametrize("make", [Inline, Vectorised])
def test_a_run_learns_with_adapters_and_head_alone(make: MakeExecutor) -> None:
    candidate = finished(plan(rounds=8, evaluation=Evaluation()), make)
    assert sorted(candidate.params) == sorted([*ADAPTERS, *HEAD])
    assert float(candidate.params["1.up.weight"].norm()) > 0.1
    assert candidate.scores["accuracy"] > 0.9


def test_sums_of_adapters_are_masked_and_algorithms_keep_state_of_them_alone() -> None:
    hidden = Secagg("sa1", clip=20.0, weight_cap=500.0)
    silent = Evaluation(at_end=False)
    plain = plan(quorum=4, strategy=Scaffold(), evaluation=silent)
    masked = finished(replace(plain, secagg=hidden)).params
    assert (masked - finished(plain).params).norm() < 1e-4


def test_record_privacy_takes_them_layer_by_layer() -> None:
    recipe, site = Adapted(), SiteId("site-0")
    rows, example = holdings()[site].train, recipe.example(5)
    assert RowGradients(recipe.build(), recipe.loss, example).is_layered
    brief = Brief(Params(recipe.build().state_dict()))
    task = Task(TaskId("t"), RunId("r"), 1, site, "train", brief)
    privacy = Privacy("record", epsilon=8.0, delta=1e-5, rounds=1)
    trainer = Trainer(recipe, Training(lr=0.1, steps=3, batch_size=32), privacy)
    update, _ = trainer.train(task, rows, {}, seed=1, public_rows=len(rows))
    assert sorted(update.delta) == sorted([*ADAPTERS, *HEAD])
    assert update.delta.is_finite()
    assert all(bool(update.delta[name].any()) for name in update.delta)


def test_merged_it_is_a_plain_model_that_answers_the_same() -> None:
    model, x = Adapted().build(), Adapted().example(6)
    model.load_state_dict(dict(finished(plan()).params))
    answers = model(x)
    whole = merge(model)
    assert type(whole.get_submodule("1")) is nn.Linear
    torch.testing.assert_close(whole(x), answers)
    assert (answers - base()(x)).abs().max() > 0.1


def test_a_release_holds_the_adapters_to_train_on_and_all_of_it_to_serve(tmp_path: Path) -> None:
    recipe, params = Adapted(), finished(plan()).params
    build(tmp_path, recipe.build(), params, recipe.example(40), facts())
    model = recipe.build()
    model.load_state_dict(dict(params))
    x = recipe.example(9)
    found = Session(tmp_path / MODEL).run({"input": x.numpy()})["output"]
    torch.testing.assert_close(torch.from_numpy(found), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert decode((tmp_path / WEIGHTS).read_bytes())[""] == params


def test_another_frozen_model_is_refused_with_its_digest() -> None:
    model = base()
    with torch.no_grad():
        model.get_parameter("1.weight")[0, 0] += 1e-3
    told = rf"has digest {digest(model)}, the recipe says {digest(base())}: fetch"
    with pytest.raises(ConfigError, match=told):
        adapt(model, ["1"], frozen=digest(base()))
    with pytest.raises(ConfigError, match=r"the recipe says none: .* write this digest into"):
        adapt(model, ["1"], frozen="")


def test_what_cannot_be_adapted_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"pattern 'head' matches no layer to adapt; there are 1"):
        adapt(base(), ["head"], frozen=digest(base()))
    with pytest.raises(ConfigError, match=r"rank 0 and alpha 16.0 of adapters"):
        adapt(base(), ["1"], frozen=digest(base()), rank=0)
    image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ConfigError, match=r"layer 0 is a Conv2d: only nn.Linear can have"):
        adapt(image, ["*"], frozen=digest(image))
    normal = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(ConfigError, match=r"1: BatchNorm1d moves its statistics"):
        adapt(normal, ["0"], frozen=digest(normal))
