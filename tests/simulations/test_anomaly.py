"""The detector learns from normal rows alone, and where normal ends."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from fedml.errors import ConfigError
from fedml.learning.evaluation import evaluate
from fedml.learning.recipe import Rows
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task
from simulations.anomaly import figures
from simulations.anomaly.data import Clinics
from simulations.anomaly.recipe import QUANTILE, Anomaly

torch.set_num_threads(1)
RECIPE = Anomaly()


def train(rows: Rows, training: Training) -> Params:
    torch.manual_seed(0)
    params = Params(RECIPE.build().state_dict())
    task = Task(TaskId("t"), RunId("r"), 1, SiteId("s"), "train", Brief(params))
    update, _ = Trainer(RECIPE, training, Privacy()).train(task, rows, {}, seed=0)
    return params + update.delta


def test_clinics_train_on_benign_samples_and_score_each_sample_once() -> None:
    dealt = Clinics(seed=4).deal(RECIPE, None)
    assert all(int(one.train.y.sum()) == 0 for one in dealt.values())
    every = [part for one in dealt.values() for part in (one.train, one.held_out)]
    assert sum(map(len, every)) == 569
    assert sum(int(part.y.sum()) for part in every) == 212
    radii = [one.train.x[:, 0] for one in dealt.values()]
    assert all(float(a.max()) <= float(b.min()) for a, b in itertools.pairwise(radii))


def test_one_clinic_alone_is_scored_on_the_samples_of_all() -> None:
    every = Clinics(seed=4).deal(RECIPE, None)
    ((site, alone),) = Clinics(seed=4, only=3).deal(RECIPE, None).items()
    assert torch.equal(alone.train.x, every[site].train.x)
    assert len(alone.held_out) == sum(len(one.held_out) for one in every.values())


def test_an_anomalous_row_teaches_nothing() -> None:
    rows = RECIPE.example(40)
    labels = torch.arange(40) % 2
    wild = torch.where(labels[:, None] == 1, rows * 3, rows)
    training = Training(lr=0.1, steps=5)
    learnt = [train(Rows(x, labels), training) for x in (rows, wild)]
    assert learnt[0] == learnt[1]
    assert learnt[0] != train(Rows(wild, torch.zeros_like(labels)), training)


def test_the_limit_comes_to_rest_at_the_quantile() -> None:
    strangeness = torch.linspace(-4.0, 2.0, 1000)
    limit = torch.zeros(1, requires_grad=True)
    normal = torch.zeros(1000, dtype=torch.long)
    for _ in range(3000):
        loss = RECIPE.loss(torch.stack([strangeness, limit.expand(1000)], dim=1), normal)
        (slope,) = torch.autograd.grad(loss, limit)
        with torch.no_grad():
            limit -= 0.05 * slope
    assert limit.item() == pytest.approx(strangeness.quantile(QUANTILE).item(), abs=0.1)


def test_the_limit_pulls_at_no_weight_of_the_network() -> None:
    torch.manual_seed(0)
    model, rows = RECIPE.build(), RECIPE.example(8)
    output = model(rows)
    normal = torch.zeros(8, dtype=torch.long)
    whole = torch.autograd.grad(RECIPE.loss(output, normal), list(model.parameters()))
    errors = torch.autograd.grad(
        model(rows)[:, 0].mean(), list(model.parameters()), allow_unused=True
    )
    for name, one, other in zip(dict(model.named_parameters()), whole, errors, strict=True):
        assert name == "limit.weight" or (other is not None and torch.allclose(one, other))


def test_scores_are_shares_of_all_rows() -> None:
    output = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    scores = RECIPE.score(output, torch.tensor([1, 1, 0, 0]))
    assert scores["alarm_right"].tolist() == [1, 0, 0, 0]
    assert scores["alarm_wrong"].tolist() == [0, 0, 1, 0]
    assert scores["strange"].tolist() == [1, 1, 0, 0]


def test_figures_are_rates_of_each_kind(tmp_path: Path) -> None:
    scores = {"alarm_right": 0.3, "alarm_wrong": 0.05, "strange": 0.5}
    (tmp_path / "summary.json").write_text(json.dumps({"scores": scores}))
    assert figures.detection_rate(tmp_path) == pytest.approx(0.6)
    assert figures.false_alarms(tmp_path) == pytest.approx(0.1)


def test_training_tells_malignant_samples_apart() -> None:
    (one,) = Clinics(sites=1).deal(RECIPE, None).values()
    params = train(one.train, Training(lr=0.3, epochs=20, batch_size=16))
    task = Task(TaskId("t"), RunId("r"), 1, SiteId("s"), "evaluate", Brief(params))
    totals = evaluate(RECIPE, task, one.held_out, Privacy()).totals
    found = totals["alarm_right"] / totals["strange"]
    false = totals["alarm_wrong"] / (len(one.held_out) - totals["strange"])
    assert found > 0.4 and false < 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"sites": 0}, "population.sites 0"), ({"only": 5}, "population.only 5: use 0 to 4")],
)
def test_impossible_clinics_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Clinics(**settings)
