"""The gate: the site's last word on a task, before anything is downloaded or charged.

Pure: it holds an assignment against the policy and says yes with the terms, or no with the line
of the policy that forbids it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from fedml.errors import Busy, Refused
from fedml.privacy.accounting import Event, evaluation_event, training_event, unit_of
from fedml.protocol.messages import Assignment, PrivacyMode, RecipeId, RunId
from fedml.protocol.secagg import Masking
from fedml.site.policy import AllowedApp, Dataset, Policy

# modes of a run, by what the policy demands
_ALLOWED: Mapping[PrivacyMode, tuple[PrivacyMode, ...]] = {
    "record": ("record",),
    "patient": ("patient",),
    "site_central": ("site_central", "record", "patient"),
    "record_distributed": ("record_distributed", "record"),
    "site_distributed": ("site_distributed", "record", "patient"),
    "none": get_args(PrivacyMode),
}


@dataclass(frozen=True)
class Permit:
    """The terms on which a task may run. `event` is its privacy cost, None where none is asked.

    `planned` is how many such events the run is made of, as far as that was fixed ahead. Of a
    Flower app the rows are whatever it reads: `app` says where it is, and nothing else holds.
    """

    dataset: Dataset
    rows: Path
    part: Literal["train", "held-out"]
    event: Event | None
    planned: int = 1
    app: AllowedApp | None = None


def decide(policy: Policy, assignment: Assignment, installed: Sequence[RecipeId]) -> Permit:
    """Return the terms for `assignment`; raises `Refused` naming the policy's line."""
    _check_company(policy, assignment)
    if assignment.app:
        return _app_terms(policy, assignment)
    _check_recipe(policy, assignment.recipe, installed)
    dataset = policy.datasets.get(assignment.dataset)
    if dataset is None:
        has = ", ".join(policy.datasets) or "none"
        raise Refused(f"policy has no [datasets.{assignment.dataset}]; it has {has}")
    if assignment.recipe.name not in dataset.recipes:
        raise Refused(
            f"policy datasets.{assignment.dataset}.recipes = {list(dataset.recipes)}: "
            f"{assignment.recipe.name} may not read these rows"
        )
    mode = assignment.privacy.mode
    if mode not in _ALLOWED[dataset.privacy]:
        raise Refused(
            f"policy datasets.{assignment.dataset}.privacy = {dataset.privacy!r}: "
            f"the task asks for mode {mode!r}"
        )
    if mode == "patient" and not dataset.patients:
        raise Refused(
            f"policy datasets.{assignment.dataset}.patients is not set: "
            "the task asks for mode 'patient', which takes a public number of patients"
        )
    if mode != "none" and unit_of(mode) not in ("site", dataset.unit):
        raise Refused(
            f"policy datasets.{assignment.dataset}.patients = {dataset.patients}: "
            f"the budget is a patient's, the task asks for mode {mode!r}"
        )
    if mode != "none" and assignment.privacy.delta > dataset.delta:
        raise Refused(
            f"policy datasets.{assignment.dataset}.delta = {dataset.delta}: "
            f"the task asks for {assignment.privacy.delta}"
        )
    if mode != "none" and assignment.privacy.epsilon > dataset.run_epsilon:
        raise Refused(
            f"policy datasets.{assignment.dataset}.run_epsilon = {dataset.run_epsilon}: "
            f"the run asks for {assignment.privacy.epsilon}"
        )
    return _terms(dataset, assignment)


def _check_company(policy: Policy, assignment: Assignment) -> None:
    """Look at who else is in the sum, and whether it hides us."""
    if assignment.cohort < policy.minimum_cohort:
        raise Refused(
            f"policy minimum_cohort = {policy.minimum_cohort}: "
            f"this round asks only {assignment.cohort} sites"
        )
    if policy.secagg == "required" and not assignment.masking:
        raise Refused("policy secagg = 'required': the task's answer would not be masked")
    if assignment.privacy.shares_noise:
        _check_sharers(policy, assignment)


def _check_sharers(policy: Policy, assignment: Assignment) -> None:
    """Raise `Refused` unless every sum that can be opened has the whole noise, and nothing else."""
    mode = assignment.privacy.mode
    if not assignment.masking:
        raise Refused(
            f"mode {mode!r} adds a share of the noise alone, which protects nothing "
            "unless updates are summed under secure aggregation: the task's answer would not be "
            "masked"
        )
    masking, sharers = Masking.from_json(assignment.masking), assignment.privacy.sharers
    honest = masking.threshold - policy.colluders
    if sharers > honest:
        raise Refused(
            f"policy colluders = {policy.colluders}: the masked sum may be of {masking.threshold} "
            f"sites, whose {honest} honest ones add too little noise if it is to be the shares of "
            f"{sharers}"
        )
    if assignment.kind == "train" and (bare := [p.name for p in masking.parts if not p.whole]):
        raise Refused(
            f"mode {mode!r} hides a sum in whole numbers and nothing beside it: the "
            f"task asks for {bare[0]!r} too, or otherwise"
        )


def _app_terms(policy: Policy, assignment: Assignment) -> Permit:
    """Return the terms for a message to a Flower app, whose every answer is of mode 'none'."""
    wanted, app = assignment.recipe, policy.apps.get(assignment.recipe.name)
    if app is None:
        raise Refused(f"policy allows no app {wanted.name!r}: {sorted(policy.apps)}")
    if app.digest != wanted.digest:
        raise Refused(
            f"policy apps.{wanted.name}.digest = {app.digest[:12]}…: "
            f"the task names {wanted.digest[:12]}…"
        )
    if assignment.kind != "train" or assignment.masking or assignment.privacy.mode != "none":
        raise Refused(f"policy apps.{wanted.name}: a message to an app is no other task besides")
    for name in app.datasets:
        if (privacy := policy.datasets[name].privacy) != "none":
            raise Refused(
                f"policy datasets.{name}.privacy = {privacy!r}: what app {wanted.name} tells of "
                "these rows has no privacy and no charge"
            )
    nothing = Dataset(app.folder, 1, (), privacy="none")
    return Permit(nothing, app.folder, "train", None, app=app)


def check_room(policy: Policy, others: Collection[RunId]) -> None:
    """Raise `Busy` if the site already works for as many other runs as it may."""
    if len(others) >= policy.runs_at_once:
        raise Busy(f"policy runs_at_once = {policy.runs_at_once}: at work for {sorted(others)}")


def _check_recipe(policy: Policy, wanted: RecipeId, installed: Sequence[RecipeId]) -> None:
    allowed = policy.recipes.get(wanted.name)
    if allowed is None:
        raise Refused(f"policy allows no recipe {wanted.name!r}: {sorted(policy.recipes)}")
    if allowed.digest != wanted.digest:
        raise Refused(
            f"policy recipes.{wanted.name}.digest = {allowed.digest[:12]}…: "
            f"the task names {wanted.digest[:12]}…"
        )
    if wanted not in installed:
        raise Refused(f"recipe {wanted.name} {wanted.digest[:12]}… is allowed but not installed")


def _terms(dataset: Dataset, assignment: Assignment) -> Permit:
    private = assignment.privacy.mode != "none"
    if assignment.kind == "train":
        event = None
        if private:
            event = training_event(assignment.training, assignment.privacy, dataset.units)
        return Permit(dataset, dataset.train, "train", event, assignment.privacy.rounds)
    if dataset.held_out is None:
        raise Refused(f"policy datasets.{assignment.dataset}.held_out is not set: nothing to score")
    charge = evaluation_event(assignment.privacy) if private else None
    return Permit(dataset, dataset.held_out, "held-out", charge)
