"""Small plans, sites and answers for tests of rounds, and a host that lives in memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from fedml.params import Params
from fedml.protocol.messages import DatasetCard, RecipeId, RunId, SiteId, TaskId, Training
from fedml.protocol.operations import Receipt
from fedml.protocol.tasks import Report, Task, Update
from fedml.rounds import (
    Candidate,
    Cohort,
    Command,
    Commit,
    Committed,
    End,
    Evaluation,
    Event,
    Opened,
    Plan,
    ReportArrived,
    Run,
    SendTask,
    SitesChanged,
    SiteStatus,
    UpdateArrived,
)
from fedml.strategies import FedAvgM, ServerState

RECIPE = RecipeId("line", "ab" * 32)
SITES = tuple(SiteId(name) for name in ("bern", "kyoto", "quito"))
MODEL = Params({"w": torch.zeros(2)})
RUN = RunId("run-1")


def plan(**changes: object) -> Plan:
    base = Plan(
        model="line",
        recipe=RECIPE,
        dataset="points",
        strategy=FedAvgM(beta=0.5),
        training=Training(lr=0.1, steps=3),
        cohort=Cohort(quorum=2, deadline=60.0),
        rounds=3,
        evaluation=Evaluation(at_end=False),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def status(site: str, *, connected: bool = True, rows: int = 10) -> SiteStatus:
    card = DatasetCard("points", rows, "cd" * 32)
    return SiteStatus(SiteId(site), connected, (RECIPE,), (card,))


ALL = SitesChanged(tuple(status(site) for site in SITES))


def answer(task: Task, value: float = 1.0) -> Event:
    """What an honest site sends for `task`: the same bytes whenever it is asked."""
    if task.kind == "evaluate":
        return ReportArrived(Report(task.id, task.round, task.site, {"accuracy": 8.0}, 10.0, 0.1))
    shift = torch.full((2,), value * task.round + SITES.index(task.site))
    delta = Params({"w": shift})
    update = Update(task.id, task.round, task.site, delta, 1.0 + SITES.index(task.site))
    return UpdateArrived(update, delta.digest())


@dataclass
class Host:
    """Carries out a run's commands in memory, and remembers what a disk would."""

    run: Run
    log: list[Command] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)
    state: ServerState | None = None
    opened: Opened | None = None
    tasks: dict[TaskId, Task] = field(default_factory=dict)
    commits_at_once: bool = True

    def start(self) -> Host:
        self.carry(self.run.open(100.0))
        return self

    def feed(self, *events: Event) -> None:
        for event in events:
            self.carry(self.run.handle(event, 200.0))

    def carry(self, commands: list[Command]) -> None:
        self.log += commands
        for command in commands:
            match command:
                case SendTask(task):
                    self.tasks[task.id] = task
                case Opened():
                    self.opened = command
                case Commit(receipt, state):
                    self.receipts.append(receipt)
                    self.state = state or self.state
                    if self.commits_at_once:
                        self.feed(Committed())
                case _:
                    pass

    def open_tasks(self) -> list[Task]:
        """The tasks of the round that opened last."""
        assert self.opened is not None
        opening = self.opened.opening
        return [self.tasks[opening.task_id(site)] for site in opening.asked]

    def play_round(self) -> None:
        self.feed(*(answer(task) for task in self.open_tasks()))

    @property
    def ends(self) -> list[End]:
        return [command for command in self.log if isinstance(command, End)]

    @property
    def candidates(self) -> list[Candidate]:
        return [command for command in self.log if isinstance(command, Candidate)]


def host(a_plan: Plan) -> Host:
    return Host(Run.begin(RUN, a_plan, MODEL)).start()
