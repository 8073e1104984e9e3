"""A policy says what a site allows; what is odd in the file is named, with its value."""

from pathlib import Path

import pytest

from fedml.errors import ConfigError
from fedml.site.policy import TEMPLATE, read_policy

DIGEST = "ab" * 32
GOOD = f"""
minimum_cohort = 3
task_seconds = 60

[recipes.cancer]
digest = "{DIGEST}"
file = "mine.py:Mine"

[datasets.records]
train = "data/train.csv"
held_out = "/abs/held.csv"
rows = 100
recipes = ["cancer"]
epsilon = 3
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return path


def test_a_fresh_policy_allows_nothing(tmp_path: Path) -> None:
    policy = read_policy(written(tmp_path, TEMPLATE))
    assert not policy.recipes
    assert not policy.datasets


def test_the_template_with_its_examples_switched_on_is_a_good_policy(tmp_path: Path) -> None:
    text = TEMPLATE.replace("# [", "[").replace('# file = "', '#file="').replace("…", DIGEST)
    keys = ("digest", "train", "held_out", "rows", "recipes", "privacy", "epsilon", "delta")
    for key in (*keys, "folder", "datasets", "seeded", "node_config"):
        text = text.replace(f"# {key} =", f"{key} =")
    policy = read_policy(written(tmp_path, text))
    assert policy.datasets["records"].epsilon == 3.0
    assert policy.recipes["breast-cancer"].digest == DIGEST
    app = policy.apps["quickstart"]
    assert app.folder == tmp_path / f"apps/quickstart-{DIGEST}"
    assert (app.datasets, app.seeded) == (("records",), False)
    assert app.node_config == {"partition-id": 0, "num-partitions": 2}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "policy.apps.ward.privacy is missing"),
        ('privacy = "record"', "use one of \\['none'\\]"),
        ('privacy = "none"\ndatasets = ["rows"]', r"apps.ward: there is no \[datasets.rows\]"),
        ('privacy = "none"\nnode_config = { a = [1] }', "must be an object of texts, numbers"),
    ],
)
def test_an_app_is_allowed_by_saying_that_it_has_no_privacy(
    line: str, message: str, tmp_path: Path
) -> None:
    text = f'[apps.ward]\ndigest = "{DIGEST}"\nfolder = "apps/ward"\n{line}\n'
    with pytest.raises(ConfigError, match=message):
        read_policy(written(tmp_path, text))


def test_paths_are_relative_to_the_policy_s_own_folder(tmp_path: Path) -> None:
    policy = read_policy(written(tmp_path, GOOD))
    dataset = policy.datasets["records"]
    assert dataset.train == tmp_path / "data" / "train.csv"
    assert dataset.held_out == Path("/abs/held.csv")
    assert policy.recipe_files == {"cancer": f"{tmp_path / 'mine.py'}:Mine"}
    assert (policy.minimum_cohort, policy.task_seconds, dataset.epsilon) == (3, 60.0, 3.0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rows = 100", 'rows = "many"', "rows 'many': must be a whole number"),
        ("rows = 100", "rows = 0", "rows 0: state a public row count of 1 or more"),
        ("epsilon = 3", "", "epsilon 0.0: privacy 'record' needs a budget above 0"),
        ("epsilon = 3", "epsilon = 3\ndelta = 1.5", "delta 1.5: must lie between 0 and 1"),
        ("epsilon = 3", "epsilon = 3\nprivacy = 'some'", "use one of"),
        ("epsilon = 3", "epsilom = 3", "epsilom is unknown"),
        ("rows = 100", "", "rows is missing"),
        ("rows = 100", "rows = 100\npatients = -1", "patients -1: state a public number"),
        ("epsilon = 3", "epsilon = 3\nprivacy = 'patient'", "privacy 'patient' needs `patients`"),
        ("rows = 100", "rows = 100\npatients = 9", "patients 9 with privacy 'record'"),
        ("epsilon = 3", "patients = 9\nprivacy = 'patient'", "'patient' needs a budget above 0"),
        ('recipes = ["cancer"]', 'recipes = ["other"]', "no \\[recipes.other\\] entry"),
        (DIGEST, "xyz", "'xyz' is no SHA-256"),
        ("minimum_cohort = 3", "minimum_cohort = 0", "minimum_cohort 0: must be above 0"),
        ("minimum_cohort = 3", "minimum_cohort = true", "minimum_cohort True"),
        ("minimum_cohort = 3", "minimum_cohort = = 3", "Invalid"),
    ],
)
def test_each_odd_line_is_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message) as caught:
        read_policy(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_policy_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run 'fedml site join TOKEN' first"):
        read_policy(tmp_path / "policy.toml")
