"""The door: nothing that was made of rows leaves a site but through here, reserved and charged.

An order is admitted by setting its cost aside, and its result released by charging it. What is
released is kept on the disk, byte for byte, so the same order is answered with the same bytes and
never a second time with others. Of private training the door tells the weight and the metrics
itself, from what is public: a worker's words about its rows stay here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedml import durable, failpoints, telemetry
from fedml.errors import Corrupt, FedmlError, MalformedMessage, Refused
from fedml.privacy import chain
from fedml.privacy.accounting import SampledGaussian, Unit, unit_of
from fedml.privacy.ledger import Ledger, Limits
from fedml.protocol.messages import Assignment, Parcel, Scored, TaskId, Trained
from fedml.site.gate import Permit
from fedml.site.memory import Desk, Memory, Result
from fedml.site.policy import Policy
from fedml.transport.chunks import transit_blob

Mask = Callable[[Assignment, Desk, float], Awaitable[None]]
Ledgers = Mapping[tuple[str, Unit], Ledger]  # by dataset and unit


@dataclass(frozen=True)
class Book:
    """Where a dataset's ledger for one kind of unit lies, and what the policy grants."""

    path: Path
    name: str
    unit: Unit
    limits: Limits


def books(folder: Path, policy: Policy) -> Iterator[Book]:
    """Yield the ledgers that a site keeps: one for every dataset and unit that has a budget."""
    for name, dataset in policy.datasets.items():
        caps = dataset.delta, dataset.run_epsilon, dataset.recipe_epsilon
        if dataset.epsilon > 0:
            path = folder / "ledger" / f"{name}.jsonl"
            yield Book(path, name, dataset.unit, Limits(dataset.epsilon, *caps))
        if dataset.site_epsilon > 0:
            path = folder / "ledger" / "site" / f"{name}.jsonl"
            yield Book(path, name, "site", Limits(dataset.site_epsilon, *caps))


def unpaid(folder: Path, book: Book) -> str:
    """Say which answer lies ready to leave, or has left, and is not charged in `book`; "" if none.

    Where a ledger and its guard are both put back from a backup, this tells.
    """
    memory, paid = Memory(folder), set[TaskId]()
    if book.path.exists():
        paid = {entry.task for entry in chain.read(book.path) if entry.state == "charged"}
    for task in memory.kept():
        try:
            order, result = memory.assignment(task), memory.result(task)
        except MalformedMessage:  # in the words of a version that we do not know
            continue
        if order is None or result is None or _account(order) != (book.name, book.unit):
            continue
        if result.epsilon > 0 and task not in paid:  # it says itself that it was charged
            return (
                f"{book.path}: task {task} was answered, and no charge is there: the ledger is "
                "older than the answer; docs/operations.md says what to do about a lost ledger"
            )
    return ""


@contextmanager
def open_ledgers(folder: Path, policy: Policy) -> Iterator[Ledgers]:
    """Hold the ledger of every dataset that has a budget; raises `Corrupt` or `ConfigError`.

    `Corrupt` too if a ledger does not know of an answer that was given.
    """
    with ExitStack() as stack:
        ledgers = {}
        for book in books(folder, policy):
            ledger = Ledger(book.path, name=book.name, limits=book.limits, unit=book.unit)
            stack.callback(ledger.close)
            if problem := unpaid(folder, book):
                raise Corrupt(problem)
            ledgers[book.name, book.unit] = ledger
        yield ledgers


class Door:
    """The one way out of a site. `ledgers` hold the budgets, `memory` what was released."""

    def __init__(self, ledgers: Ledgers, memory: Memory) -> None:
        self._ledgers, self._memory = ledgers, memory

    async def give_back_orphans(self) -> None:
        """Give back what is reserved for orders that nobody knows any more."""
        kept = set(self._memory.kept())
        for ledger in self._ledgers.values():
            for task in ledger.reserved():
                if task not in kept:
                    await asyncio.to_thread(ledger.void, task)

    def released(self, order: Assignment) -> Result | None:
        """Return what was released for this very order, or None."""
        known = self._memory.assignment(order.task) == order
        return self._memory.result(order.task) if known else None

    async def admit(self, order: Assignment, permit: Permit) -> Desk:
        """Note the order and set its cost aside; raises `Refused`, having kept nothing of it."""
        desk = self._memory.accept(order)  # before the ledger: a reservation is never orphaned
        failpoints.reach("order.noted")
        try:
            ledger = self._ledger(order, permit)
            if ledger is None or permit.event is None:
                return desk
            if ledger.is_charged(order.task) and not desk.outcome.exists():
                raise Refused(
                    f"task {order.task} was charged and answered before, and is not done again "
                    "for nothing; submit a new run. A coordinator whose folder was made anew "
                    f"counts its runs from 1: submit until the number is above {order.run}'s, "
                    "or restore the old folder"
                )
            await asyncio.to_thread(
                ledger.reserve, order.task, order.run, permit.part, permit.event,
                planned=permit.planned, recipe=order.recipe.name,
            )  # fmt: skip
        except FedmlError:
            self._memory.forget(order.task, counted=False)
            raise
        return desk

    async def release(self, order: Assignment, permit: Permit, desk: Desk, mask: Mask) -> Result:
        """Charge the order, then return what may leave, which is on the disk for good.

        An order that says so is masked in between, by `mask`.
        """
        epsilon = 0.0
        if ledger := self._ledger(order, permit):
            await asyncio.to_thread(ledger.charge, order.task)  # on disk before anything leaves
            epsilon = await asyncio.to_thread(lambda: ledger.spent(run=order.run))
            if ledger.unit != "site":
                spent = await asyncio.to_thread(ledger.spent)
                telemetry.EPSILON.labels(order.dataset).set(spent)
        failpoints.reach("work.charged")
        if order.masking:
            weight = await asyncio.to_thread(_weight, order, permit, desk)
            await mask(order, desk, weight)
        result = await asyncio.to_thread(_result, order, permit, desk, epsilon)
        self._memory.finish(result)
        failpoints.reach("result.kept")
        return result

    async def give_back(self, order: Assignment) -> None:
        """Void an order's reservation: its work failed, and nothing will leave."""
        if ledger := self._ledgers.get(_account(order)):
            await asyncio.to_thread(ledger.void, order.task)

    def forget(self, task: TaskId, *, counted: bool) -> None:
        """Delete what is kept of a task. What it would have cost is free, unless it is charged."""
        order = self._memory.assignment(task)
        if order is not None and (ledger := self._ledgers.get(_account(order))):
            # first: with the order gone, nobody would know of the reservation after a crash
            ledger.void(task)  # nothing happens if it was charged
        failpoints.reach("task.voided")
        self._memory.forget(task, counted=counted)

    def _ledger(self, order: Assignment, permit: Permit) -> Ledger | None:
        """Return the ledger that pays; None where the policy wants nothing paid."""
        ledger = self._ledgers.get(_account(order)) if permit.event is not None else None
        if ledger is None and permit.dataset.privacy != "none":
            raise Refused(f"policy datasets.{order.dataset}.privacy: no answer without a charge")
        return ledger


def _account(order: Assignment) -> tuple[str, Unit]:
    return order.dataset, unit_of(order.privacy.mode)


def _result(order: Assignment, permit: Permit, desk: Desk, epsilon: float) -> Result:
    outcome = durable.read_json(desk.outcome)
    try:
        if order.masking:  # weight and metrics are in the sum
            return Trained(order.task, transit_blob(desk.update), 0.0, {}, epsilon)
        if order.kind == "evaluate":
            return Scored(order.task, outcome["totals"], outcome["count"], epsilon)
        blob, form = transit_blob(desk.update), outcome.get("form", "")
        parcels = (Parcel(form, transit_blob(desk.update_parcel)),) if form else ()
        weight, metrics = outcome["weight"], outcome["metrics"]
        if isinstance(permit.event, SampledGaussian):
            weight, metrics = _public(order, permit, permit.event)
        return Trained(order.task, blob, weight, metrics, epsilon, parcels)
    except (OSError, KeyError, TypeError) as error:
        raise Corrupt(f"{desk.outcome} does not tell a result ({error!r})") from error


def _weight(order: Assignment, permit: Permit, desk: Desk) -> float:
    """Return what an answer counts in a masked sum: under privacy no row has a part in it."""
    if order.kind == "train" and isinstance(permit.event, SampledGaussian):
        return _public(order, permit, permit.event)[0]
    return float(durable.read_json(desk.outcome)["weight"])


def _public(
    order: Assignment, permit: Permit, event: SampledGaussian
) -> tuple[float, dict[str, float]]:
    """Return weight and metrics of private training, in which no row has a part."""
    if unit_of(order.privacy.mode) == "site":
        return 1.0, {}
    metrics = {"steps": float(event.steps), "noise_multiplier": event.noise}
    return float(permit.dataset.units), metrics
