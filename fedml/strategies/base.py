"""The two halves of a federated algorithm, and the values that pass between them.

A `Strategy` is the server half, a `LocalRule` the site half. Both are pure: no IO, no clock, no
global random state. All server state is `ServerState`, so every algorithm checkpoints alike.
A strategy is a frozen dataclass whose fields are its settings, checked at birth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedml.errors import ConfigError, MalformedUpdate
from fedml.params import Layout, Params
from fedml.protocol.messages import Scores
from fedml.protocol.tasks import Brief, Slots, Stack, Sum, Update

NUMBER = Layout((("value", torch.float64, ()),))  # of a slot that is one number


@dataclass(frozen=True)
class ServerState:
    """The global model after `step` rounds, with the algorithm's own slots."""

    params: Params
    slots: Slots = field(default_factory=dict)
    step: int = 0


@dataclass(frozen=True)
class Aggregate:
    """A cohort's updates as one: the mean delta, slots and metrics, their weight and count.

    `damped` are the sites whose updates a robust reducer let count for little, with the reason.
    """

    delta: Params
    slots: Slots
    weight: float
    count: int
    metrics: Scores = field(default_factory=dict)
    damped: Mapping[str, str] = field(default_factory=dict)

    def number(self, slot: str) -> float:
        """Return the mean of what sites reported in a slot that is one number."""
        return float(self.slots[slot]["value"])


class Reduction(Protocol):
    """A running reduction; it lives for one round."""

    def add(self, update: Update) -> None:
        """Take one update in, or raise `MalformedUpdate` and stay as it was."""

    def result(self) -> Aggregate:
        """Return the aggregate of everything added, the same whatever the order.

        At least one update is required. Raises `MalformedUpdate` if the updates, each sound by
        itself, have no aggregate.
        """


@runtime_checkable
class StackReduction(Reduction, Protocol):
    """A reduction that takes many updates at once, with the bits of one by one."""

    def add_stack(self, stack: Stack) -> Mapping[int, str]:
        """Take in every row that `add` would take; return for each other row what it would say."""


def add_stack(reduction: Reduction, stack: Stack) -> Mapping[int, str]:
    """Add a stack's rows to any reduction; return why rows were refused, by row."""
    if isinstance(reduction, StackReduction):
        return reduction.add_stack(stack)
    refused = {}
    for row in range(len(stack)):
        try:
            reduction.add(stack.update(row))
        except MalformedUpdate as error:
            refused[row] = str(error)
    return refused


@runtime_checkable
class SumReduction(Reduction, Protocol):
    """A reduction that is exact in parts: sums of parts add up to the bits of one whole sum."""

    def total(self) -> tuple[Mapping[str, Params], Mapping[str, int]]:
        """Return the sum of what was added as `Sum.parts` and `Sum.reach`.

        Raises `MalformedUpdate` if it does not fit.
        """

    def add_sum(self, total: Sum, layouts: Mapping[str, Layout]) -> None:
        """Take in all of its summands, or raise `MalformedUpdate` and stay as it was.

        `layouts` are those of an update's parts, "" for the delta.
        """


class Reducer(Protocol):
    """A way to make one aggregate of many updates."""

    @property
    def linear(self) -> bool:
        """True if the sum is all it needs, so secure aggregation may hide single updates."""

    @property
    def least(self) -> int:
        """The fewest updates it can make an aggregate of; a plan's quorum is not below."""

    def start(self) -> Reduction:
        """Begin a round's reduction."""


class Strategy(Protocol):
    """Server half of an algorithm. Implement these to add your own.

    With a class attribute `in_turn = True` each round asks one site, one after the other. Two more
    methods may say what cannot work, before anything runs, each reason with the way out:
      objections(training)     of how sites are to train
      misfits(params, rounds)  of so many rounds from a model with these parameters
    """

    @property
    def reducer(self) -> Reducer:
        """How updates become one aggregate."""

    def start(self, params: Params) -> ServerState:
        """Return the state before the first round."""

    def brief(self, state: ServerState) -> Brief:
        """Return what this round's sites need to know."""

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Return the state after a round; the old one stays as it was."""


class LocalRule(Protocol):
    """Site half of an algorithm: bends local gradients and reports what the server half needs.

    Class attributes may say more of it:
      elementwise = True   `gradient` treats each element by itself; many sites then run at once,
                           with `Stacked` in the place of `Params`
      numbers = {"tau"}    of what it reports, the slots that are one number each, see `number`
      keeps_deltas = True  sites add up their deltas as the server does: they must not be rounded
      reads_loss = True    `path` has `loss` too, the mean over all of the site's rows at the global
                           model; that is exact, so record privacy refuses the rule
    """

    @property
    def reports(self) -> frozenset[str]:
        """Names of the slots that `finish` reports; an update with others is refused."""

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return the gradient to step along, given the plain one at `params`."""

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Return (slots to report, memory to keep); `path` has `lr`, `momentum`, `steps` taken.

        What is reported as `delta` travels in the place of the delta, and is no slot.
        """


@runtime_checkable
class Personal(LocalRule, Protocol):
    """A rule that leaves a part of the model with its site.

    Sites start from what `begin` returns and are scored with it; `finish` gets the delta from it.
    """

    def begin(self, brief: Brief, memory: Slots) -> Params:
        """Return the site's own model: the brief's, with what this site remembers in its place."""


@dataclass(frozen=True)
class Sample:
    """All of a site's rows, `x` and `y`, and what its recipe makes of them, differentiable."""

    x: Tensor
    y: Tensor
    outputs: Callable[[Params], Tensor]  # of the model with these parameters, for `x`
    criterion: Callable[[Tensor, Tensor], Tensor]  # mean loss of outputs for targets

    def loss(self, params: Params) -> Tensor:
        """Return the mean loss over all the rows."""
        return self.criterion(self.outputs(params), self.y)


@runtime_checkable
class Twofold(Personal, Protocol):
    """A rule whose sites train two models: the one that travels, and then one of their own.

    The first goes from the brief's model, bent by `gradient`; their own from what `begin` returns,
    bent by `own_gradient`. No privacy clips or hides the steps of that one, which never leaves;
    `finish` finds it in memory as `own`.
    """

    def own_gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return the gradient to step along with the site's own model, at `params`."""


@runtime_checkable
class Follower(LocalRule, Protocol):
    """A rule with something that goes along with the model while a task lasts.

    What `follow` returns is the memory at the next step, and at the finish.
    """

    def follow(self, brief: Brief, memory: Slots, params: Params, steps: int) -> Slots:
        """Return what to remember after `steps` steps that led to `params`, which go on moving."""


@runtime_checkable
class Contrast(LocalRule, Protocol):
    """A rule that adds to a batch's loss what it makes of several models' representations of it.

    A representation, [rows, size], is what a model's last layer takes in. Rows' own gradients of
    the term are not bounded, so record privacy refuses the rule.
    """

    def others(self, brief: Brief, memory: Slots) -> tuple[Params, ...]:
        """Return the models to hold the trained one against; none if there is nothing to add."""

    def term(self, brief: Brief, mine: Tensor, theirs: Sequence[Tensor]) -> Tensor:
        """Return what is added, a scalar; `theirs` come as `others` does, without gradients."""


class Statistic(Protocol):
    """Site half of an algorithm whose sites measure at the global model and take no step.

    What it reports is exact, so record privacy refuses it. It may say more of it:
      layouts(settings)   by name, how those slots are laid out that are not shaped like the
                          model, given the settings of a brief
      needs_exact_model = True
                          what it reports belongs to the very bits of the model, which must not be
                          rounded on its way
      bounded = True      each number is a mean over rows, and what a row can add to it has a bound,
                          which `secagg.clip` may be; others cannot be masked
    """

    def reports(self, brief: Brief) -> frozenset[str]:
        """Return the names of the slots that `measure` reports."""

    def measure(self, brief: Brief, sample: Sample) -> tuple[Params, Slots]:
        """Return (delta, slots)."""


class Plain:
    """Local SGD as it is."""

    reports: frozenset[str] = frozenset()
    elementwise = True

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return `grads` unchanged."""
        return grads

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report and keep nothing."""
        return {}, {}


def number(value: float) -> Params:
    """Return a slot that is one number; sites' numbers are averaged by weight as deltas are."""
    return Params({"value": torch.tensor(value, dtype=torch.float64)})


def path_weight(path: Mapping[str, float]) -> float:
    """Return by how many plain gradients times `lr` a path of SGD with momentum has moved.

    Without momentum that is `steps`. It is the norm |a|_1 of Wang et al. 2020, section 4.1.
    """
    steps, keep = path["steps"], path.get("momentum", 0.0)
    return float((steps - keep * (1 - keep**steps) / (1 - keep)) / (1 - keep))


def share(count: int, sites: int) -> float:
    """Return which part of all `sites` has answered; 0 sites stands for those that have."""
    return min(1.0, count / sites) if sites else 1.0


def check_sites(what: str, sites: int) -> None:
    """Raise `ConfigError` unless `sites` can be how many sites there are, or 0."""
    if sites < 0:
        raise ConfigError(f"{what} {sites}: give the number of all sites, or 0 if all are asked")


def check_setting(
    what: str, value: float, *, least: float = 0.0, below: float = math.inf, open_: bool = False
) -> None:
    """Raise `ConfigError` unless `least` <= `value` < `below`; `open_` leaves `least` out."""
    if (least < value if open_ else least <= value) and value < below:
        return
    start = f"above {least:g}" if open_ else f"{least:g} or more"
    raise ConfigError(f"{what} {value}: must be {start} and below {below:g}")
