"""What rounds and strategies deal in: tasks and answers with their tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from fedml.errors import MalformedUpdate
from fedml.params import Params, pieces
from fedml.protocol.messages import RunId, Scores, SiteId, Summand, TaskId
from fedml.stacked import Stacked

Slots = Mapping[str, Params]  # an algorithm's extra state, each slot shaped like the model


@dataclass(frozen=True)
class Brief:
    """What a strategy tells every site of a round."""

    params: Params
    rule: str = "plain"  # name of the site-side half, looked up in the site's own list
    settings: Mapping[str, float] = field(default_factory=dict)
    slots: Slots = field(default_factory=dict)

    def digest(self) -> str:
        """Return the BLAKE3 of all its tensors, as the blob is named in which they travel."""
        if not self.slots:
            return self.params.digest()
        from blake3 import blake3

        digest = blake3()
        for piece in pieces({"": self.params, **self.slots}):
            digest.update(piece)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
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
class Stack:
    """Updates of many sites to one round at once, a site a row; each counts as if alone.

    Nothing but a simulation makes one: on the wire every site speaks for itself. `metrics` holds
    one value a row; `epsilons` none at all stands for zeros.
    """

    round: int
    sites: tuple[SiteId, ...]
    tasks: tuple[TaskId, ...]
    delta: Stacked
    weights: tuple[float, ...]
    slots: Mapping[str, Stacked] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[float]] = field(default_factory=dict)
    epsilons: Sequence[float] = ()

    def __post_init__(self) -> None:
        counts = {len(self.tasks), len(self.weights), self.delta.rows, len(self.sites)}
        counts |= {slot.rows for slot in self.slots.values()}
        counts |= {len(values) for values in self.metrics.values()}
        counts |= {len(self.epsilons)} if self.epsilons else set()
        if len(counts) != 1:
            raise MalformedUpdate(f"a stack of {len(self.sites)} sites has parts of {counts} rows")

    def __len__(self) -> int:
        return len(self.sites)

    def epsilon(self, row: int) -> float:
        """Return what a row's site has spent."""
        return self.epsilons[row] if self.epsilons else 0.0

    def update(self, row: int) -> Update:
        """Return one row as the update that its site would have sent; tensors are views."""
        return Update(
            self.tasks[row],
            self.round,
            self.sites[row],
            self.delta.row(row),
            self.weights[row],
            {name: slot.row(row) for name, slot in self.slots.items()},
            {name: values[row] for name, values in self.metrics.items()},
            self.epsilon(row),
        )

    def take(self, rows: Sequence[int]) -> Stack:
        """Return the stack of these rows; all of them in order is `self`, with no copy."""
        if list(rows) == list(range(len(self))):
            return self
        return Stack(
            self.round,
            tuple(self.sites[row] for row in rows),
            tuple(self.tasks[row] for row in rows),
            self.delta.take(rows),
            tuple(self.weights[row] for row in rows),
            {name: slot.take(rows) for name, slot in self.slots.items()},
            {name: [values[row] for row in rows] for name, values in self.metrics.items()},
            [self.epsilons[row] for row in rows] if self.epsilons else (),
        )


@dataclass(frozen=True)
class Sum:
    """Many sites' updates to one round as one exact sum; which ones is in `summands`.

    `parts` and `reach` are as the region's reduction made them, see `strategies.SumReduction`.
    """

    round: int
    summands: tuple[Summand, ...]
    parts: Mapping[str, Params]
    reach: Mapping[str, int]


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
