"""What rounds and strategies deal in: tasks and answers with their tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from fedml.params import Params
from fedml.protocol.messages import RunId, Scores, SiteId, TaskId

Slots = Mapping[str, Params]  # an algorithm's extra state, each slot shaped like the model


@dataclass(frozen=True)
class Brief:
    """What a strategy tells every site of a round."""

    params: Params
    rule: str = "plain"  # name of the site-side half, looked up in the site's own list
    settings: Mapping[str, float] = field(default_factory=dict)
    slots: Slots = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One site's work order for one round: train on the brief, or score its parameters."""

    id: TaskId
    run: RunId
    round: int
    site: SiteId
    kind: Literal["train", "evaluate"]
    brief: Brief


@dataclass(frozen=True)
class Update:
    """A site's answer to a training task.

    `delta` is local minus global parameters, shaped like the model; `weight` how much it counts
    (examples, or under privacy a public number); `epsilon` what the site's ledger says its rows
    have spent on this run so far.
    """

    task: TaskId
    round: int
    site: SiteId
    delta: Params
    weight: float
    slots: Slots = field(default_factory=dict)
    metrics: Scores = field(default_factory=dict)
    epsilon: float = 0.0


@dataclass(frozen=True)
class Report:
    """A site's answer to an evaluation task: sums over its held-out rows, noised under privacy.

    `totals` holds for each score the sum over rows; a mean is a total over `count`.
    """

    task: TaskId
    round: int
    site: SiteId
    totals: Scores
    count: float
    epsilon: float = 0.0
