"""The gate gives the site the last word: what the policy does not allow is refused, and why."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedml.errors import Refused
from fedml.privacy import accounting
from fedml.privacy.accounting import SampledGaussian
from fedml.protocol.messages import Assignment, Blob, Privacy, RecipeId, RunId, TaskId, Training
from fedml.site.gate import decide
from fedml.site.policy import AllowedApp, AllowedRecipe, Dataset, Policy

RECIPE = RecipeId("cancer", "ab" * 32)
OTHER = RecipeId("cancer", "cd" * 32)
POLICY = Policy(
    minimum_cohort=3,
    recipes={"cancer": AllowedRecipe(RECIPE.digest), "stroke": AllowedRecipe("ef" * 32)},
    datasets={
        "records": Dataset(
            Path("train"), 100, ("cancer",), Path("held"), epsilon=3.0, run_epsilon=3.0
        ),
        "open": Dataset(Path("train"), 100, ("cancer",), privacy="none"),
        "wards": Dataset(
            Path("train"), 100, ("cancer",), privacy="patient", epsilon=3.0, patients=40
        ),
    },
)
TASK = Assignment(
    task=TaskId("run-1.1.1.bern"),
    run=RunId("run-1"),
    round=1,
    kind="train",
    recipe=RECIPE,
    dataset="records",
    model=Blob("00" * 32, 10),
    training=Training(lr=1.0, steps=5),
    privacy=Privacy("record", 3.0, 1e-5, rounds=10, evaluation_epsilon=0.5),
    cohort=4,
)


def test_an_allowed_task_is_permitted_with_its_cost() -> None:
    permit = decide(POLICY, TASK, [RECIPE])
    assert (permit.rows, permit.part) == (Path("train"), "train")
    assert isinstance(permit.event, SampledGaussian)
    assert (permit.event.steps, permit.planned) == (5, 10)


def test_an_evaluation_reads_and_charges_held_out_rows() -> None:
    permit = decide(POLICY, replace(TASK, kind="evaluate"), [RECIPE])
    assert (permit.rows, permit.part) == (Path("held"), "held-out")
    assert permit.event is not None and permit.planned == 1


def test_a_dataset_open_to_it_may_be_used_without_privacy() -> None:
    task = replace(TASK, dataset="open", privacy=Privacy())
    assert decide(POLICY, task, [RECIPE]).event is None


def test_a_patient_s_task_costs_by_the_public_number_of_patients() -> None:
    training = replace(TASK.training, batch_size=10)
    privacy = replace(TASK.privacy, mode="patient")
    task = replace(TASK, dataset="wards", training=training, privacy=privacy)
    event = decide(POLICY, task, [RECIPE]).event
    assert isinstance(event, SampledGaussian) and event.sampling == 10 / 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cohort": 2}, "policy minimum_cohort = 3: this round asks only 2 sites"),
        ({"recipe": RecipeId("unknown", "ab" * 32)}, "policy allows no recipe 'unknown'"),
        ({"recipe": OTHER}, "policy recipes.cancer.digest = abababababab…: the task names cdcd"),
        ({"dataset": "secret"}, "policy has no \\[datasets.secret\\]; it has records, open, wards"),
        ({"privacy": Privacy()}, "policy datasets.records.privacy = 'record'"),
        (
            {"privacy": replace(TASK.privacy, delta=1e-3)},
            "policy datasets.records.delta = 1e-05: the task asks for 0.001",
        ),
        (
            {"privacy": replace(TASK.privacy, mode="record_distributed", sharers=4)},
            "mode 'record_distributed' adds a share of the noise alone",
        ),
        (
            {
                "privacy": replace(TASK.privacy, mode="record_distributed", sharers=4),
                "dataset": "open",
            },
            "summed under secure aggregation: the task's answer would not be masked",
        ),
        (
            {"privacy": replace(TASK.privacy, epsilon=3.1)},
            "policy datasets.records.run_epsilon = 3.0: the run asks for 3.1",
        ),
        (
            {"privacy": replace(TASK.privacy, mode="patient")},
            "policy datasets.records.privacy = 'record': the task asks for mode 'patient'",
        ),
        (
            {"dataset": "wards"},
            "datasets.wards.privacy = 'patient': the task asks for mode 'record'",
        ),
        (
            {"dataset": "open", "privacy": replace(TASK.privacy, mode="patient")},
            "policy datasets.open.patients is not set: the task asks for mode 'patient'",
        ),
        ({"kind": "evaluate", "dataset": "open"}, "policy datasets.open.held_out is not set"),
    ],
)
def test_policy_widened_by_the_plan_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(Refused, match=message):
        decide(POLICY, replace(TASK, **change), [RECIPE])  # type: ignore[arg-type]


CENTRAL = Privacy("site_central", 2.0, 1e-5, rounds=10)


def test_a_policy_that_trusts_the_coordinator_takes_either_privacy() -> None:
    trusting = replace(POLICY.datasets["records"], privacy="site_central", site_epsilon=2.5)
    policy = replace(POLICY, datasets={"records": trusting})
    permit = decide(policy, replace(TASK, privacy=CENTRAL), [RECIPE])
    assert permit.event == accounting.training_event(TASK.training, CENTRAL, 100)
    assert decide(policy, TASK, [RECIPE]).event is not None
    with pytest.raises(Refused, match="privacy = 'site_central': the task asks for mode 'none'"):
        decide(policy, replace(TASK, privacy=Privacy()), [RECIPE])
    with pytest.raises(Refused, match="scores are not noised under site_central"):
        decide(policy, replace(TASK, privacy=CENTRAL, kind="evaluate"), [RECIPE])


def test_a_policy_that_trusts_nobody_takes_no_word_for_the_noise() -> None:
    with pytest.raises(Refused, match="privacy = 'record': the task asks for mode 'site_central'"):
        decide(POLICY, replace(TASK, privacy=CENTRAL), [RECIPE])


def test_a_recipe_may_only_read_the_datasets_it_is_listed_for() -> None:
    task = replace(TASK, recipe=RecipeId("stroke", "ef" * 32))
    with pytest.raises(Refused, match="stroke may not read these rows"):
        decide(POLICY, task, [RecipeId("stroke", "ef" * 32)])


def test_a_recipe_that_is_allowed_but_not_installed_is_refused() -> None:
    with pytest.raises(Refused, match="allowed but not installed"):
        decide(POLICY, TASK, [OTHER])


# --- Flower apps --------------------------------------------------------------------------------

APP = RecipeId("ward", "ab" * 32)
WARDS = replace(
    POLICY,
    apps={
        "ward": AllowedApp(APP.digest, Path("apps/ward"), "none", ("open",)),
        "nosy": AllowedApp(APP.digest, Path("apps/nosy"), "none", ("open", "records")),
    },
)
MESSAGE = replace(TASK, recipe=APP, dataset="ward", privacy=Privacy(), app="{}")


def test_a_message_to_an_allowed_app_is_permitted_and_costs_nothing() -> None:
    permit = decide(WARDS, MESSAGE, [])
    assert permit.app == WARDS.apps["ward"]
    assert permit.event is None


@pytest.mark.parametrize(
    ("message", "policy", "reason"),
    [
        (MESSAGE, POLICY, "policy allows no app 'ward': []"),
        (
            replace(MESSAGE, recipe=RecipeId("ward", "cd" * 32)),
            WARDS,
            "policy apps.ward.digest = abababababab…: the task names cdcdcdcdcdcd…",
        ),
        (
            replace(MESSAGE, recipe=RecipeId("nosy", APP.digest)),
            WARDS,
            "policy datasets.records.privacy = 'record': what app nosy tells of these rows has no "
            "privacy and no charge",
        ),
        (
            replace(MESSAGE, cohort=2),
            WARDS,
            "policy minimum_cohort = 3: this round asks only 2 sites",
        ),
        (
            MESSAGE,
            replace(WARDS, secagg="required"),
            "policy secagg = 'required': the task's answer would not be masked",
        ),
        (
            replace(MESSAGE, privacy=Privacy("record", 3.0, 1e-5)),
            WARDS,
            "policy apps.ward: a message to an app is no other task besides",
        ),
        (
            replace(MESSAGE, kind="evaluate"),
            WARDS,
            "policy apps.ward: a message to an app is no other task besides",
        ),
    ],
)
def test_a_message_to_an_app_is_refused_by_the_line_that_forbids_it(
    message: Assignment, policy: Policy, reason: str
) -> None:
    with pytest.raises(Refused) as refused:
        decide(policy, message, [])
    assert str(refused.value) == reason


def test_an_app_that_is_no_recipe_is_no_way_to_a_recipes_rows() -> None:
    with pytest.raises(Refused, match="policy allows no recipe 'ward'"):
        decide(WARDS, replace(MESSAGE, app=""), [RECIPE])
