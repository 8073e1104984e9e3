"""What a round does with answers: check each against the brief, then take it into the total."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from fedml.errors import MalformedMessage, MalformedUpdate
from fedml.params import Params
from fedml.protocol.messages import Scores
from fedml.protocol.parcels import rounded
from fedml.protocol.tasks import Brief, Report, Stack, Sum, Update
from fedml.stacked import Stacked
from fedml.strategies import Aggregate, Reducer, SumReduction, add_stack, layouts

_MOST_NAMES, _LONGEST_NAME = 64, 64  # of metrics and scores; receipts keep them for good
_HUGE = 1e300  # a sum of totals below this cannot overflow


@dataclass(frozen=True)
class Lag:
    """What becomes of a delta that answers an older model: `scale` * (delta + `way`).

    `way` leads from today's model to that one; None where the delta counts by itself.
    """

    scale: float = 1.0
    way: Params | None = None

    def catch_up(self, delta: Params) -> Params:
        """Return the delta as it counts today; its integers are as they were."""
        if self.way is None:
            return delta * self.scale
        return delta.zip(self.way, torch.add) * self.scale

    def catch_up_all(self, deltas: Stacked) -> Stacked:
        """Return a stack with the bits of `catch_up` on each row."""
        if self.way is None:
            return deltas * self.scale
        device = next(iter(deltas.buffers.values())).device
        ways = Stacked.repeat(self.way.to(device), deltas.rows)
        return deltas.zip(ways, torch.add) * self.scale


Lags = Callable[[int], Lag]  # by the round whose model an update was made from
TODAY = Lag()


class Answers(Protocol):
    """What has come in so far, of one kind."""

    def add(self, answer: Update | Report, brief: Brief) -> None:
        """Check and take in one answer, or raise `MalformedMessage` and stay as it was."""

    def add_stack(self, stack: Stack, brief: Brief) -> Mapping[int, str]:
        """Check and take in each row as `add` would; return why the others were not, by row."""

    def add_sum(self, total: Sum, brief: Brief) -> None:
        """Check and take in a region's sum, or raise `MalformedMessage` and stay as it was."""

    def result(self) -> Aggregate | Scores:
        """Return what all answers come to; raises `MalformedMessage` if that is nothing."""


class Updates:
    """Checks updates against the brief and streams them into a reduction."""

    def __init__(
        self,
        reducer: Reducer,
        reports: frozenset[str],
        *,
        coarse: bool = False,
        lags: Lags = lambda _: TODAY,
    ) -> None:
        """Reduce with `reducer`; each update must have the slots `reports`.

        If `coarse`, deltas are rounded to bfloat16, unless their sites have done it already.
        `lags` says what becomes of those that answer older models.
        """
        self._reduction, self._reports, self._coarse = reducer.start(), reports, coarse
        self._lags = lags

    def add(self, answer: Update | Report, brief: Brief) -> None:
        """Refuse an update that has other slots, another layout, or is not finite."""
        if not isinstance(answer, Update):
            raise MalformedUpdate("it is a report, not an update")
        if self._coarse:
            answer = replace(answer, delta=rounded(answer.delta))
        self._check(answer, brief)
        if (lag := self._lags(answer.round)) is not TODAY:
            answer = replace(answer, delta=lag.catch_up(answer.delta))
        self._reduction.add(answer)

    def add_stack(self, stack: Stack, brief: Brief) -> Mapping[int, str]:
        """Look at single rows only if the stack as a whole is not beyond doubt."""
        if self._coarse:
            stack = replace(stack, delta=rounded(stack.delta))
        refused: dict[int, str] = {}
        if not self._is_sound(stack, brief):
            for row in range(len(stack)):
                try:
                    self._check(stack.update(row), brief)
                except MalformedMessage as error:
                    refused[row] = str(error)
        sound = [row for row in range(len(stack)) if row not in refused]
        if sound:
            taken = stack.take(sound)
            if (lag := self._lags(stack.round)) is not TODAY:
                taken = replace(taken, delta=lag.catch_up_all(taken.delta))
            more = add_stack(self._reduction, taken)
            refused.update({sound[row]: reason for row, reason in more.items()})
        return refused

    def _is_sound(self, stack: Stack, brief: Brief) -> bool:
        wanted = layouts(brief, self._reports)
        parts = (stack.delta, *stack.slots.values())
        return (
            stack.slots.keys() == self._reports
            and len(stack.metrics) <= _MOST_NAMES
            and all(len(n) <= _LONGEST_NAME and n.isprintable() for n in stack.metrics)
            and all(0 < weight < math.inf for weight in stack.weights)
            and stack.delta.layout == brief.params.layout
            and all(slot.layout == wanted[name] for name, slot in stack.slots.items())
            and all(part.is_finite() for part in parts)
        )

    def _check(self, answer: Update, brief: Brief) -> None:
        if answer.slots.keys() != self._reports:
            got, wanted = sorted(answer.slots), sorted(self._reports)
            raise MalformedUpdate(f"it has slots {got}, rule {brief.rule} reports {wanted}")
        _check_names(answer.metrics)
        if not 0 < answer.weight < math.inf:
            raise MalformedUpdate(f"weight {answer.weight}: must be finite and above 0")
        brief.params.check_like(answer.delta)
        for name, layout in layouts(brief, self._reports).items():
            layout.check_like(answer.slots[name].layout)
        for part in (answer.delta, *answer.slots.values()):
            if not part.is_finite():
                raise MalformedUpdate(f"its norm is {part.norm()}: training diverged")

    def add_sum(self, total: Sum, brief: Brief) -> None:
        """Refuse a sum that is not of such updates as `add` takes; it cannot look at each."""
        if not isinstance(self._reduction, SumReduction):
            raise MalformedUpdate("it is a sum, and the reducer needs each update")
        for summand in total.summands:
            _check_names(summand.metrics)
        self._reduction.add_sum(total, {"": brief.params.layout, **layouts(brief, self._reports)})

    def total(self) -> tuple[Mapping[str, Params], Mapping[str, int]]:
        """Return the sum of all that was taken in; see `SumReduction`."""
        if not isinstance(self._reduction, SumReduction):
            raise MalformedUpdate("the reducer has no sums")
        return self._reduction.total()

    def result(self) -> Aggregate:
        """Return the cohort's updates as one."""
        return self._reduction.result()


class Reports:
    """Adds up scores; a mean is a sum of totals over the sum of their counts."""

    def __init__(self) -> None:
        self._terms: dict[str, list[tuple[float, float]]] = {}

    def add(self, answer: Update | Report, brief: Brief) -> None:
        """Refuse a report with a total or count that is not finite."""
        if not isinstance(answer, Report):
            raise MalformedMessage("it is an update, not a report")
        _check_names(answer.totals)
        for name, value in {"count": answer.count, **answer.totals}.items():
            if not abs(value) < _HUGE:
                raise MalformedMessage(f"its {name} is {value}")
        for name, total in answer.totals.items():
            self._terms.setdefault(name, []).append((total, answer.count))

    def add_stack(self, stack: Stack, brief: Brief) -> Mapping[int, str]:
        """Refuse all: a stack holds updates."""
        return dict.fromkeys(range(len(stack)), "it is an update, not a report")

    def add_sum(self, total: Sum, brief: Brief) -> None:
        """Refuse it: it holds updates."""
        raise MalformedMessage("it is a sum of updates, not a report")

    def result(self) -> Scores:
        """Return each score's mean over the rows of the sites that report it.

        Scores lie in [0, 1]; what privacy noise pushed out is brought back, which is free.
        """
        scores = {}
        for name, terms in sorted(self._terms.items()):
            count = math.fsum(count for _, count in terms)
            if count > 0:  # under privacy counts are noised, and may vanish
                mean = math.fsum(total for total, _ in terms) / max(count, 1.0)
                scores[name] = min(1.0, max(0.0, mean))
        if not scores:
            raise MalformedMessage("the sites' counts add up to no rows")
        return scores


def _check_names(numbers: Scores) -> None:
    if len(numbers) > _MOST_NAMES:
        raise MalformedUpdate(f"it has {len(numbers)} metrics, at most {_MOST_NAMES} are kept")
    for name in numbers:
        if len(name) > _LONGEST_NAME or not name.isprintable():
            raise MalformedUpdate(f"metric {name!r:.70}: use 1-{_LONGEST_NAME} printable letters")
