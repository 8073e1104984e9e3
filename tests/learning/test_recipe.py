from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path

import pytest
import torch

from fedml.errors import ConfigError, Refused
from fedml.learning import recipe
from fedml.learning.recipe import Rows
from fedml.protocol.messages import RecipeId

OWN = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Mine:
    labels: tuple[str, ...] = ("no", "yes")
"""


@pytest.fixture
def own(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    return {"mine": f"{file}:Mine"}


def test_our_recipes_are_there_with_the_digest_of_their_source() -> None:
    known = {found.name: found for found in recipe.installed()}
    assert {"breast_cancer", "heart_disease"} <= known.keys()
    source = Path(recipe.__file__).parents[1] / "recipes" / "breast_cancer.py"
    assert known["breast_cancer"].digest == hashlib.sha256(source.read_bytes()).hexdigest()


def test_a_recipe_loads_by_name_and_digest() -> None:
    found = recipe.load(recipe.identify("breast_cancer"))
    assert found.labels == ("benign", "malignant")


def test_an_operators_own_file_is_a_recipe(own: dict[str, str]) -> None:
    wanted = recipe.identify("mine", own)
    assert wanted in recipe.installed(own)
    assert recipe.load(wanted, own).labels == ("no", "yes")
    assert recipe.load(wanted, own).labels == ("no", "yes")


def test_listing_recipes_imports_none(tmp_path: Path) -> None:
    file = tmp_path / "bomb.py"
    file.write_text("raise SystemExit('imported')")
    extra = {"bomb": f"{file}:Bomb"}
    before = set(sys.modules)
    assert recipe.identify("bomb", extra).name == "bomb"
    assert not {name for name in set(sys.modules) - before if "bomb" in name}


def test_an_unknown_recipe_is_refused_with_what_there_is(own: dict[str, str]) -> None:
    with pytest.raises(Refused, match=r"no recipe 'lungs'.*breast_cancer, .*heart_disease, mine"):
        recipe.load(RecipeId("lungs", "0" * 64), own)


def test_another_version_of_the_source_is_refused(own: dict[str, str]) -> None:
    wanted = recipe.identify("mine", own)
    Path(own["mine"].rpartition(":")[0]).write_text(OWN + "# changed\n")
    with pytest.raises(Refused, match="install the version"):
        recipe.load(wanted, own)


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("/nowhere/file.py:Mine", "No such file"),
        ("/nowhere/file.py", r"write /path/file\.py:Class"),
    ],
)
def test_a_wrong_place_is_told_in_one_line(target: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        recipe.identify("mine", {"mine": target})


def test_a_file_that_does_not_load_names_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("import no_such_module_at_all")
    extra = {"bad": f"{file}:Bad"}
    with pytest.raises(ConfigError, match=r"recipe bad .* does not load"):
        recipe.load(recipe.identify("bad", extra), extra)


def test_an_own_recipe_cannot_take_the_name_of_another(own: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="rename one"):
        recipe.installed({"breast_cancer": own["mine"]})


def test_rows_check_themselves_at_birth() -> None:
    with pytest.raises(ConfigError, match="one entry a row"):
        Rows(torch.zeros(3, 2), torch.zeros(4))
    with pytest.raises(ConfigError, match="inputs: row 1 has NaN"):
        Rows(torch.tensor([[0.0], [math.nan]]), torch.zeros(2))
    with pytest.raises(ConfigError, match="targets: row 0"):
        Rows(torch.zeros(1, 1), torch.tensor([math.inf]))


def test_dividing_keeps_each_row_in_its_part_whatever_rows_are_around_it() -> None:
    x, y = torch.randn(400, 3), torch.arange(400)
    trained, held = Rows(x, y).divide(0.25, seed=3)
    assert 60 < len(held) < 140 and len(trained) + len(held) == 400
    order = torch.randperm(400)[:399]  # one row removed, all the others moved
    trained_, held_ = Rows(x, y).take(order).divide(0.25, seed=3)
    gone = set(range(400)) - set(order.tolist())
    assert set(held.y.tolist()) - gone == set(held_.y.tolist())
    assert set(trained.y.tolist()) - gone == set(trained_.y.tolist())
    assert set(Rows(x, y).divide(0.25, seed=4)[1].y.tolist()) != set(held.y.tolist())


def test_dividing_by_a_senseless_share_is_refused() -> None:
    rows = Rows(torch.zeros(2, 1), torch.zeros(2))
    assert len(rows.divide(0.0)[1]) == 0
    with pytest.raises(ConfigError, match="held-out share"):
        rows.divide(1.0)
