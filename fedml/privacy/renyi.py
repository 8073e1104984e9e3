"""A budget for events that are chosen one after another, in the light of what was answered before.

Plain composition takes all events as fixed ahead. Over a site's life they are not: who saw one
run's model chooses the next run's settings. A filter may be asked before each event, and what it
promises holds however the events were chosen.

What is proven. Let an event be granted only if, with all granted before it, the sums of Renyi
divergences stay within the budget of one of the `orders`. Then all answers together are
(limit, delta)-DP:

* For one order alone this is the Renyi filter of Feldman & Zrnic 2021, arXiv:2008.11193, and the
  conversion to (epsilon, delta) of Canonne, Kamath & Steinke 2020, arXiv:2004.00010. The order
  infinity is a sum of pure epsilons, with delta 0 (Rogers et al. 2016, arXiv:1605.08294).
* Which order still has room may depend on the answers. Each order therefore has its own share of
  delta, and the shares add up to delta: the answers that order a lets through are those of the
  filter with a alone, so a union over the orders bounds what is lost.
* The orders and shares are a function of limit and delta, and so declared before anything is asked.

A run's plan *is* fixed ahead. If the runs that were pledged before the first answer left would
together break the filter, and by privacy loss distributions keep the limit with `PLANNED` of
delta, that share is theirs: as long as nothing else is granted, their plan is the proof. Whatever
is granted beside them goes by the filter with the rest of delta. Which of both ways a ledger goes
is settled by what was pledged before the first answer, and so by no answer.

Sums are of add/remove adjacency: neighbours differ by one unit, there or not.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedml.privacy import accounting
from fedml.privacy.accounting import PLANNED, Event, Pure, SampledGaussian
from fedml.protocol.messages import RunId, TaskId

_HIGHEST = 4096  # order; the best one for epsilon 0.01
_SHARES = (0.6, 0.4)  # of delta: the order that is best for Gaussian noise, and a lower one
_LOWER = 0.7  # of the best order: sampling with little noise is dear at high ones
_SLACK = 1e-9  # of epsilon: sums of floats may pass a limit by rounding


@dataclass(frozen=True)
class Pledge:
    """A task's event, and how many such events its run was planned with; 1 is this one alone."""

    run: RunId
    event: Event
    planned: int = 1


class Filter:
    """What was granted of one budget, task by task; see the module for what it proves."""

    def __init__(self) -> None:
        self._held: dict[TaskId, Pledge] = {}
        self._opening: Counter[tuple[RunId, Event]] | None = None

    def hold(self, task: TaskId, pledge: Pledge) -> None:
        """Take a granted task in; whether it was granted rightly is not asked again."""
        self._held[task] = pledge

    def give_back(self, task: TaskId) -> None:
        """Forget a task of which nothing left."""
        self._held.pop(task, None)

    def answer(self) -> None:
        """Note that an answer leaves: from now on nothing is fixed ahead but what is pledged."""
        if self._opening is None:
            self._opening = _plan(self._held.values())

    def need(self, pledge: Pledge, limit: float, delta: float) -> float:
        """Return the epsilon that must be allowed, at `delta`, for `pledge` to be granted."""
        held = Counter((p.run, p.event) for p in (*self._held.values(), pledge))
        opening = self._opening
        if opening is None:
            before = _plan(self._held.values())
            opening = _plan([*self._held.values(), pledge])
            if _is_covered(before, limit, delta) and not _is_covered(opening, limit, delta):
                opening = before  # who came first keeps what was set aside for it
        if not _is_covered(opening, limit, delta):
            return _renyi(held, limit, delta)
        if held <= opening:
            return accounting.epsilon(_events(opening), PLANNED * delta)
        return _renyi(held, limit, (1 - PLANNED) * delta)

    def fits(self, pledge: Pledge, limit: float, delta: float) -> bool:
        """True if `pledge` may be granted."""
        return self.need(pledge, limit, delta) <= limit + _SLACK


def epsilon(events: Iterable[Event], limit: float, delta: float) -> float:
    """Return the epsilon that a filter made for `limit` and `delta` holds `events` to."""
    return _renyi(Counter((RunId(""), event) for event in events), limit, delta)


def orders(limit: float, delta: float) -> Mapping[int, float]:
    """Return the filter's finite orders, each with its share of delta; infinity needs none."""
    return _orders(limit, delta)


@functools.lru_cache(maxsize=65_536)
def divergence(event: Event, order: int) -> float:
    """Return the Renyi divergence of `order` that one unit, added or removed, makes in `event`.

    Sampled Gaussians: Mironov, Talwar & Zhang 2019, arXiv:1908.10530, section 3.3, exact for whole
    orders. Pure events: that of randomised response, the worst there is (Mironov 2017,
    arXiv:1702.07476).
    """
    match event:
        case SampledGaussian(sampling, noise, steps):
            return steps * _gaussian(sampling, noise, order)
        case Pure(cost, releases):
            yes = -math.log1p(math.exp(-cost))
            no = yes - cost
            terms = (order * yes + (1 - order) * no, order * no + (1 - order) * yes)
            return releases * min(cost, _log_sum(terms) / (order - 1))


def _gaussian(sampling: float, noise: float, order: int) -> float:
    exponent = 1 / (2 * noise**2)
    if sampling == 1:
        return order * exponent
    terms = [
        math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-sampling) + k * math.log(sampling)
        + (k * k - k) * exponent
        for k in range(order + 1)
    ]  # fmt: skip
    return max(0.0, _log_sum(terms) / (order - 1))


def _log_sum(terms: Iterable[float]) -> float:
    terms = list(terms)
    most = max(terms)
    return most + math.log(math.fsum(math.exp(term - most) for term in terms))


def _renyi(held: Counter[tuple[RunId, Event]], limit: float, delta: float) -> float:
    """Return the least epsilon by which one of the orders lets all that is `held` through."""
    pairs = [(event, count) for (_, event), count in held.items()]
    needs = [
        math.fsum(count * divergence(event, order) for event, count in pairs)
        + _price(order, share * delta)
        for order, share in _orders(limit, delta).items()
    ]
    losses = [
        count * event.epsilon * event.releases if isinstance(event, Pure) else math.inf
        for event, count in pairs
    ]
    return max(0.0, min(*needs, math.fsum(losses)))


def _price(order: int, delta: float) -> float:
    """Return what turning a divergence of `order` into (epsilon, delta) adds to epsilon."""
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


@functools.lru_cache(maxsize=256)
def _orders(limit: float, delta: float) -> dict[int, float]:
    best = max(range(2, _HIGHEST), key=lambda order: (limit - _price(order, delta)) / order)
    lower = max(2, round(_LOWER * best))
    return {best: 1.0} if best == lower else dict(zip((best, lower), _SHARES, strict=True))


def _plan(pledges: Iterable[Pledge]) -> Counter[tuple[RunId, Event]]:
    """Return how often each event comes if every run does what it was planned for."""
    pledges = list(pledges)
    plan = Counter((pledge.run, pledge.event) for pledge in pledges)
    for pledge in pledges:
        key = pledge.run, pledge.event
        plan[key] = max(plan[key], pledge.planned)
    return plan


def _is_covered(opening: Counter[tuple[RunId, Event]], limit: float, delta: float) -> bool:
    """True if the plan alone keeps the limit, and the filter would not let it through."""
    if not opening or _renyi(opening, limit, delta) <= limit + _SLACK:
        return False
    return accounting.epsilon(_events(opening), PLANNED * delta) <= limit + _SLACK


def _events(plan: Counter[tuple[RunId, Event]]) -> list[Event]:
    events: list[Event] = []
    for (_, event), count in plan.items():
        match event:
            case SampledGaussian(sampling, noise, steps):
                events.append(SampledGaussian(sampling, noise, steps * count))
            case Pure(cost, releases):
                events.append(Pure(cost, releases * count))
    return events
