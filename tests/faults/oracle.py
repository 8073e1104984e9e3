"""What a run comes to when nothing goes wrong: played here, in this process, by the same `Run`.

No network, no disk, no clock and no crash, so what it says is what any schedule must come to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from blake3 import blake3

from fedml.learning.evaluation import evaluate
from fedml.learning.trainer import Trainer
from fedml.params import encode
from fedml.protocol.messages import DatasetCard, RunId, SiteId, TaskId
from fedml.protocol.operations import Receipt
from fedml.protocol.parcels import is_coarse, rounded
from fedml.protocol.tasks import Task
from fedml.rounds import (
    Commit,
    Committed,
    End,
    Plan,
    ReportArrived,
    Run,
    SendTask,
    SitesChanged,
    SiteStatus,
    UpdateArrived,
)
from fedml.rounds.hosting import Event
from fedml.strategies import WeightedMean
from tests.faults.fleet import RECIPES, TRAIN, first_params


@cache
def undisturbed(plan_json: str, folders: tuple[Path, ...]) -> tuple[Receipt, ...]:
    """Return the receipts of a run without privacy, over the rows in the sites' folders."""
    plan = Plan.from_json(plan_json)
    run = Run.begin(RunId("oracle"), plan, first_params(plan))
    card = DatasetCard(plan.dataset, TRAIN, "00" * 32)
    here = {SiteId(folder.name): folder for folder in folders}
    statuses = tuple(SiteStatus(site, True, (plan.recipe,), (card,)) for site in here)
    events: deque[Event] = deque([SitesChanged(statuses)])
    commands = deque(run.open(0.0))
    while True:
        if not commands:
            commands.extend(run.handle(events.popleft(), 0.0))
            continue
        match commands.popleft():
            case SendTask(task):
                events.append(_answer(plan, task, here[task.site]))
            case Commit():
                events.appendleft(Committed())
            case End():
                return tuple(run.receipts)
            case _:
                pass


def _answer(plan: Plan, task: Task, folder: Path) -> Event:
    recipe = RECIPES[plan.recipe.name]
    if task.kind == "evaluate":
        rows = recipe.read(folder / "held_out.csv")
        return ReportArrived(evaluate(recipe, task, rows, plan.privacy))
    trainer = Trainer(recipe, plan.training, plan.privacy)
    seed = plan.task_seed(task.round, task.site)
    rows = recipe.read(folder / "train.csv")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the sites' policy says: sums in two parts have other bits
    update, _ = trainer.train(task, rows, {}, seed=seed, public_rows=TRAIN)
    torch.set_num_threads(threads)
    delta = rounded(update.delta) if is_coarse(plan.wire.up) else update.delta
    travels = b"".join(encode({"delta": delta, **update.slots}))
    return UpdateArrived(update, blake3(travels).hexdigest())


def check_each_step(plan: Plan, receipts: Sequence[Receipt], folders: Sequence[Path]) -> None:
    """Raise unless each model of a run that waits for nobody follows from who its receipts name.

    Who that is, faults may change. Each update is computed anew, from the model that its site had.
    """
    here = {SiteId(folder.name): folder for folder in folders}
    states = [plan.strategy.start(first_params(plan))]
    counted: list[str] = []
    for receipt in receipts:
        if receipt.kind != "train" or not receipt.model:
            continue
        reduction = WeightedMean().start()
        for one in receipt.counted:
            late = receipt.staleness(one.site)
            since = receipt.round - late
            own = TaskId(f"{receipt.run}.{since}.{receipt.attempt}.{one.site}")
            id = TaskId(receipt.stale.get(one.site, own))
            brief = plan.strategy.brief(states[since - 1])
            task = Task(id, receipt.run, since, one.site, "train", brief)
            event = _answer(plan, task, here[one.site])
            assert isinstance(event, UpdateArrived)
            assert event.digest == one.digest, receipt
            shrunk = event.update.delta * (1.0 + late) ** -0.5
            reduction.add(replace(event.update, delta=shrunk))
            counted.append(id)
        states.append(plan.strategy.advance(states[-1], reduction.result()))
        assert states[-1].params.digest() == receipt.model, receipt
    assert len(set(counted)) == len(counted), counted


def models(receipts: Sequence[Receipt]) -> list[tuple[int, str]]:
    """Return the digest of the model after each round that moved it."""
    return [(r.round, r.model) for r in receipts if r.kind == "train" and r.model]
