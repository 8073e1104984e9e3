"""What an attacker would try on updates and budgets, and what it gets."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import fedml
from fedml.errors import BudgetExhausted
from fedml.learning.recipe import Rows
from fedml.learning.trainer import Trainer
from fedml.params import Params
from fedml.privacy import accounting
from fedml.privacy.ledger import Ledger, Limits
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId, Training
from fedml.protocol.tasks import Brief, Task
from fedml.recipes.breast_cancer import BreastCancer

torch.set_num_threads(1)

RECIPE = BreastCancer()
PARAMS = Params(RECIPE.build().state_dict())
VICTIM = Rows(RECIPE.example(1), torch.tensor([1]))
PRIVATE = Privacy("record", epsilon=3.0, delta=1e-5, clip=0.5, rounds=20)


def update_of(rows: Rows, privacy: Privacy, *, seed: int = 0, round_: int = 1) -> Params:
    task = Task(TaskId("t"), RunId("r"), round_, SiteId("s"), "train", Brief(PARAMS))
    trainer = Trainer(RECIPE, Training(lr=1.0, steps=1), privacy)
    return trainer.train(task, rows, {}, seed=seed, public_rows=100)[0].delta


def inverted(delta: Params) -> float:
    """Return the cosine of the row that dW/db gives away with the victim's scaled row.

    Source: Phong et al. 2018, section 3, for a linear layer and one row. A cosine needs no
    division by db, which under noise is zero now and then.
    """
    found = delta["1.weight"][1]
    true = RECIPE.build()[0](VICTIM.x)[0]  # type: ignore[index]
    return abs(float(torch.cosine_similarity(found, true, dim=0)))


def test_gradient_inversion_reads_a_row_without_privacy_and_not_with_it() -> None:
    assert inverted(update_of(VICTIM, Privacy())) > 0.999
    with_privacy = [inverted(update_of(VICTIM, PRIVATE)) for _ in range(20)]
    assert sum(with_privacy) / 20 < 0.5


def test_subtracting_two_updates_of_one_seed_does_not_remove_their_noise() -> None:
    rows = Rows(RECIPE.example(100), torch.arange(100) % 2)
    torch.manual_seed(0)
    first = update_of(rows, PRIVATE, seed=1)
    torch.manual_seed(0)
    second = update_of(rows, PRIVATE, seed=1)
    assert (first - second).norm() > first.norm() / 2


def test_a_poisoned_row_neither_breaks_nor_steers_a_private_update() -> None:
    rows = Rows(RECIPE.example(100), torch.arange(100) % 2)
    rows.x[3] = 3e38
    assert update_of(rows, PRIVATE).is_finite()


def test_asking_again_and_again_with_new_task_ids_runs_out_of_budget(tmp_path: Path) -> None:
    event = accounting.training_event(Training(lr=1.0, steps=5), PRIVATE, 100)
    book = Ledger(tmp_path / "ledger", name="ward", limits=Limits(3.0, 1e-5))
    granted = 0
    with pytest.raises(BudgetExhausted):
        for number in range(1000):
            book.reserve(TaskId(f"t{number}"), RunId(f"r{number}"), "train", event)
            book.charge(TaskId(f"t{number}"))
            granted += 1
    assert granted == 16  # of the 20 that a plan would have: nobody knew how many would come
    book.close()


def test_no_accountant_ledger_or_recipe_reads_a_pickle() -> None:
    root = Path(fedml.__file__).parent
    for file in (f for part in ("privacy", "learning", "recipes") for f in (root / part).glob("*")):
        if file.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal"} & set(names), file
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load"), file
