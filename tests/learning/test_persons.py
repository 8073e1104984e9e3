"""Privacy whose unit is a person: all of his rows together are bounded, counted and kept apart."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedml.errors import ConfigError
from fedml.learning.descent import Descent
from fedml.learning.evaluation import evaluate
from fedml.learning.persons import MOST_RECORDS, check_apart
from fedml.learning.private import PrivateGradient
from fedml.learning.recipe import Rows
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.privacy.accounting import SampledGaussian
from fedml.privacy.mechanisms import MARGIN
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task, Update
from tests.learning.test_rowwise import NETS, loss

torch.set_num_threads(1)

CLIP, PATIENTS = 0.7, 30
SILENT = SampledGaussian(1.0, 1e-12, 1)


@dataclass(frozen=True)
class Given:
    """A recipe around a net of `test_rowwise`; its score is 1 for a row of ones."""

    name: str = "perceptron"
    labels: tuple[str, ...] = ("a", "b", "c")

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return NETS[self.name][0]()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return loss(output, target)

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        return {"share": (target == 1).float()}

    def read(self, path: Path) -> Rows:
        raise NotImplementedError

    def example(self, rows: int) -> Tensor:
        torch.manual_seed(1)
        return NETS[self.name][1](rows)


def some_rows(name: str = "perceptron", count: int = 100) -> Rows:
    torch.manual_seed(2)
    x = NETS[name][1](count)
    return Rows(x, torch.randint(3, (count,)), torch.randint(PATIENTS, (count,)) * 7 - 50)


def filled(
    recipe: Given, rows: Rows, event: SampledGaussian = SILENT, public: int = PATIENTS
) -> tuple[PrivateGradient, Descent]:
    model = recipe.build()
    descent = Descent(model, Brief(Params(model.state_dict())), {}, Training(lr=1.0, steps=1))
    gradient = PrivateGradient(
        recipe, descent, rows, event=event, clip=CLIP, public_rows=public, unit="patient"
    )
    gradient.fill()
    return gradient, descent


def summed(recipe: Given, rows: Rows) -> Tensor:
    """Return the noiseless sum of one step over all patients."""
    _, descent = filled(recipe, rows)
    return torch.cat([g.flatten() for g in descent.gradients.values()]).double() * PATIENTS


def without(rows: Rows, patient: int) -> Rows:
    assert rows.groups is not None
    return rows.take((rows.groups != patient).nonzero().squeeze(1))


def patient_of(rows: Rows) -> tuple[int, Tensor]:
    """Return a patient with several rows, and which they are."""
    assert rows.groups is not None
    numbers, counts = rows.groups.unique(return_counts=True)
    patient = int(numbers[int(counts.argmax())])
    return patient, (rows.groups == patient).nonzero().squeeze(1)


@pytest.mark.parametrize("name", ["perceptron", "w1", "attention", "convolutions", "own parameter"])
def test_removing_a_patient_with_exploding_features_moves_the_sum_by_the_clip(name: str) -> None:
    rows = some_rows(name)
    patient, own = patient_of(rows)
    assert len(own) > 3
    rows.x[own] *= 1e4
    rows.y[own] = int(rows.y[own[0]])
    moved = float((summed(Given(name), rows) - summed(Given(name), without(rows, patient))).norm())
    assert 0.5 * CLIP < moved <= CLIP * (1 + 1e-5)


@pytest.mark.parametrize("name", ["perceptron", "w1", "attention", "sentences", "own parameter"])
def test_a_patient_counts_by_the_mean_of_his_rows_gradients_clipped(name: str) -> None:
    recipe, rows = Given(name), some_rows(name, 40)
    assert rows.groups is not None
    model, total = recipe.build(), torch.zeros(())
    parameters = [p for p in model.parameters() if p.requires_grad]
    for patient in rows.groups.unique():
        own = rows.take((rows.groups == patient).nonzero().squeeze(1))
        parts = torch.autograd.grad([loss(model(own.x), own.y)], parameters)  # a mean over rows
        gradient = torch.cat([part.flatten() for part in parts]).double()
        total = total + gradient * min(1.0, CLIP * (1 - MARGIN) / float(gradient.norm()))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    _, descent = filled(recipe, rows)
    found = torch.cat([descent.gradients[n].flatten() for n in names]).double() * PATIENTS
    assert float((found - total).norm() / total.norm()) < 1e-5


def test_a_patient_with_a_row_that_is_not_finite_counts_as_zero() -> None:
    rows = some_rows()
    patient, own = patient_of(rows)
    rows.x[own[1]] = torch.inf
    found = summed(Given(), rows)
    assert bool(found.isfinite().all())
    assert torch.allclose(found, summed(Given(), without(rows, patient)), atol=1e-5)


def test_of_a_patient_with_many_rows_the_same_few_take_part_in_every_step() -> None:
    torch.manual_seed(4)
    x = torch.randn(5 * MOST_RECORDS, 7)
    rows = Rows(x, torch.zeros(len(x)).long(), torch.zeros(len(x)).long())
    gradient, descent = filled(Given(), rows)
    first = {name: part.clone() for name, part in descent.gradients.items()}
    gradient.fill()
    for name, part in descent.gradients.items():
        assert torch.allclose(first[name], part, atol=1e-7)
    chosen, units = gradient._persons.rows_of(torch.tensor([0]), x.device)  # type: ignore[union-attr]
    assert len(chosen.unique()) == MOST_RECORDS and len(units) == 1
    other, _ = filled(Given(), rows)
    assert other._persons.rows_of(torch.tensor([0]), x.device)[0].tolist() != chosen.tolist()  # type: ignore[union-attr]


def test_the_denominator_is_of_the_public_number_of_patients() -> None:
    rows = some_rows()
    _, once = filled(Given(), rows)
    _, twice = filled(Given(), rows, public=2 * PATIENTS)
    for name, part in once.gradients.items():
        assert torch.allclose(part, 2 * twice.gradients[name], rtol=1e-5)


def test_patients_join_a_step_whole_and_at_the_public_rate() -> None:
    gradient, _ = filled(Given(), some_rows(count=300), SampledGaussian(0.3, 1e-12, 1))
    sizes = []
    for _ in range(300):
        chosen = gradient._sampler.sample(gradient._noise)
        sizes.append(len(chosen))
    assert sum(sizes) / 300 == pytest.approx(0.3 * PATIENTS, abs=0.75)
    assert len({*sizes}) > 5 and max(sizes) <= PATIENTS


def test_chunks_hold_whole_patients(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = summed(Given(), some_rows())
    monkeypatch.setattr("fedml.learning.rowwise._MOST_ROWS", 5)
    assert torch.allclose(summed(Given(), some_rows()), whole, atol=1e-5)


ASKED = Privacy("patient", epsilon=3.0, delta=1e-5, clip=0.5, evaluation_epsilon=1e6)


def task(kind: str = "train") -> Task:
    params = Params(Given().build().state_dict())
    return Task(TaskId("t"), RunId("r"), 1, SiteId("n"), kind, Brief(params))  # type: ignore[arg-type]


def private(rows: Rows) -> Update:
    trainer = Trainer(Given(), Training(lr=1.0, steps=2, batch_size=8), ASKED)
    return trainer.train(task(), rows, {}, seed=0, public_rows=PATIENTS)[0]


def test_an_update_weighs_the_public_number_of_patients_and_tells_of_no_row() -> None:
    one, two = private(some_rows()), private(some_rows(count=17))
    assert (one.weight, one.metrics) == (two.weight, two.metrics)
    assert one.weight == PATIENTS and one.delta.is_finite()


def test_no_patients_at_all_give_counted_steps_of_noise() -> None:
    update = private(some_rows(count=0))
    assert update.metrics["steps"] == 2 and all(bool(t.any()) for t in update.delta.values())


def test_rows_that_do_not_say_whose_they_are_are_refused() -> None:
    rows = some_rows()
    with pytest.raises(ConfigError, match="do not say whose they are; let its read"):
        private(Rows(rows.x, rows.y))


def test_a_held_out_patient_moves_a_score_by_one_however_many_rows_he_has() -> None:
    groups = torch.tensor([4] * 50 + [1, 2, 3])
    rows = Rows(torch.ones(53, 7), torch.ones(53).long(), groups)
    report = evaluate(Given(), task("evaluate"), rows, ASKED)
    assert report.totals["share"] == pytest.approx(4, abs=0.1)
    assert report.count == pytest.approx(4, abs=0.1)


def test_a_patient_on_both_sides_of_a_split_is_refused() -> None:
    rows = some_rows()
    _, own = patient_of(rows)
    rest = [place for place in range(len(rows)) if place != int(own[0])]
    with pytest.raises(ConfigError, match="1 patients have rows to train on and rows held out"):
        check_apart(rows.take(rest), rows.take(own[:1]))
    check_apart(*rows.divide(0.4))


def test_dividing_keeps_a_patient_together_whatever_the_rows_around_him() -> None:
    rows = some_rows()
    train, held_out = rows.divide(0.4)
    assert len(train) and len(held_out)
    patient, own = patient_of(rows)
    alone = rows.take(own).divide(0.4)
    assert train.groups is not None
    assert len(alone[0]) == int((train.groups == patient).sum())


def test_groups_go_where_rows_go() -> None:
    rows = some_rows()
    assert rows.groups is not None
    taken = rows.take([3, 1])
    assert taken.groups is not None and taken.groups.tolist() == rows.groups[[3, 1]].tolist()
    assert torch.equal(pickle.loads(pickle.dumps(rows)).groups, rows.groups)


@pytest.mark.parametrize("groups", [torch.zeros(99).long(), torch.zeros(100), torch.zeros(100, 1)])
def test_groups_that_are_not_one_integer_a_row_are_refused(groups: Tensor) -> None:
    rows = some_rows()
    line = f"groups {list(groups.shape)} of {groups.dtype}: one integer for each of 100 rows"
    with pytest.raises(ConfigError, match=re.escape(line)):
        Rows(rows.x, rows.y, groups)
