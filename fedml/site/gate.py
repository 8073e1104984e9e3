"""The gate: the site's last word on a task, before anything is downloaded or charged.

Pure: it holds an assignment against the policy and says yes with the terms, or no with the line
of the policy that forbids it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedml.errors import Busy, Refused
from fedml.privacy.accounting import Event, evaluation_event, training_event
from fedml.protocol.messages import Assignment, RecipeId, RunId
from fedml.site.policy import Dataset, Policy


@dataclass(frozen=True)
class Permit:
    """The terms on which a task may run. `event` is its privacy cost, None where none is asked."""

    dataset: Dataset
    rows: Path
    part: Literal["train", "held-out"]
    event: Event | None


def decide(policy: Policy, assignment: Assignment, installed: Sequence[RecipeId]) -> Permit:
    """Return the terms for `assignment`; raises `Refused` naming the policy's line."""
    if assignment.cohort < policy.minimum_cohort:
        raise Refused(
            f"policy minimum_cohort = {policy.minimum_cohort}: "
            f"this round asks only {assignment.cohort} sites"
        )
    if policy.secagg == "required" and not assignment.masking:
        raise Refused("policy secagg = 'required': the task's answer would not be masked")
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
    if dataset.privacy == "record" and assignment.privacy.mode != "record":
        raise Refused(
            f"policy datasets.{assignment.dataset}.privacy = 'record': "
            f"the task asks for mode {assignment.privacy.mode!r}"
        )
    if assignment.privacy.mode == "record" and assignment.privacy.delta > dataset.delta:
        raise Refused(
            f"policy datasets.{assignment.dataset}.delta = {dataset.delta}: "
            f"the task asks for {assignment.privacy.delta}"
        )
    return _terms(dataset, assignment)


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
    private = assignment.privacy.mode == "record"
    if assignment.kind == "train":
        event = None
        if private:
            event = training_event(assignment.training, assignment.privacy, dataset.rows)
        return Permit(dataset, dataset.train, "train", event)
    if dataset.held_out is None:
        raise Refused(f"policy datasets.{assignment.dataset}.held_out is not set: nothing to score")
    charge = evaluation_event(assignment.privacy) if private else None
    return Permit(dataset, dataset.held_out, "held-out", charge)
