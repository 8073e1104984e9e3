"""The way back: a plan of ours as a Flower app, for Flower's own runtime.

Our strategy is a `flwr` strategy and drives a ServerApp; our site's training answers as a
ClientApp. What holds a plan together stays: the exact sum, checks of each update, quorum, seeds.
What our sites and coordinators give does not: a policy, a ledger, receipts. So only plans without
privacy are exported.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as theirs

from fedml import durable
from fedml.errors import ConfigError, FedmlError, MalformedMessage, QuorumLost
from fedml.flower.contents import params_of
from fedml.learning.evaluation import evaluate
from fedml.learning.recipe import load
from fedml.learning.trainer import Trainer
from fedml.params import Params, encode
from fedml.protocol.messages import RunId, SiteId, TaskId
from fedml.protocol.tasks import Brief, Report, Slots, Task, Update
from fedml.rounds.answers import Reports, Updates
from fedml.rounds.plan import Plan
from fedml.strategies import ServerState, reports

_LOOK = 0.5  # seconds between looks at who is here
_PROJECT = """\
[project]
name = "{name}"
version = "1.0.0"
description = "{name}, exported by fedml"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41", "fedml-consortium[flower]"]

[tool.flwr.app]
publisher = "fedml"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "fedml_app:server"
clientapp = "fedml_app:client"

[tool.flwr.app.config]
rounds = {rounds}

# files that the recipe reads, {{partition-id}} is the node's; its node_config may say otherwise
train = ""
held-out = ""
model = ""  # where the ServerApp leaves the model, as safetensors
"""
_APP = '''\
"""A plan of fedml as a Flower app; what is trained, and how, is in plan.toml."""

import tomllib
from pathlib import Path

from fedml.flower.export import client_app, server_app
from fedml.rounds.plan import Plan

_told = tomllib.loads((Path(__file__).parent / "plan.toml").read_text())
plan = Plan.from_json(_told["plan"])
server = server_app(plan)
client = client_app(plan)
'''


def write(plan: Plan, folder: Path) -> None:
    """Write the plan as an app's folder, as `flwr new` lays one out.

    Raises `ConfigError` if the folder has something in it, or the plan cannot be exported.
    """
    _check(plan)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} has something in it; name another folder")
    durable.make_folder(folder)
    project = _PROJECT.format(name=plan.model.replace("_", "-"), rounds=plan.rounds)
    durable.replace(folder / "pyproject.toml", project.encode())
    durable.replace(folder / "LICENSE", b"No licence is given; write yours before you publish.\n")
    durable.replace(folder / "fedml_app.py", _APP.encode())
    durable.replace(folder / "plan.toml", f"plan = {json.dumps(plan.to_json())}\n".encode())


def server_app(plan: Plan) -> ServerApp:
    """Return the plan's server half; raises `ConfigError` if it cannot be exported."""
    _check(plan)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        rounds = int(context.run_config.get("rounds", plan.rounds))
        torch.manual_seed(plan.seed)
        first = Params(load(plan.recipe).build().state_dict())
        strategy = Exported(plan, first, rounds)
        arrays, seconds = _arrays(first), plan.cohort.deadline
        strategy.start(grid, arrays, num_rounds=rounds, timeout=seconds)
        if place := context.run_config.get("model"):
            durable.replace(Path(str(place)), *encode({"": strategy.state.params}))

    return app


def client_app(plan: Plan) -> ClientApp:
    """Return the plan's site half; a node's files are in its `train` and `held-out`."""
    _check(plan)
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        recipe, task = load(plan.recipe), _task(plan, message, context)
        rows = recipe.read(_file(context, "train"))
        memory = _parts(context.state, "memory.")
        seed = plan.task_seed(task.round, task.site)
        trainer = Trainer(recipe, plan.training, plan.privacy)
        update, kept = trainer.train(task, rows, memory, seed=seed)
        for name in [name for name in context.state if name.startswith("memory.")]:
            del context.state[name]
        for name, slot in kept.items():
            context.state[f"memory.{name}"] = _arrays(slot)
        content = RecordDict({"delta": _arrays(update.delta)})
        for name, slot in update.slots.items():
            content[f"slot.{name}"] = _arrays(slot)
        content["metrics"] = MetricRecord({str(k): float(v) for k, v in update.metrics.items()})
        content["weight"] = MetricRecord({"num-examples": float(update.weight)})
        return Message(content, reply_to=message)

    @app.evaluate()
    def score(message: Message, context: Context) -> Message:
        recipe, task = load(plan.recipe), _task(plan, message, context)
        rows = recipe.read(_file(context, "held-out"))
        memory = _parts(context.state, "memory.")
        found = evaluate(recipe, task, rows, plan.privacy, memory=memory)
        content = RecordDict(
            {"totals": MetricRecord({k: float(v) for k, v in found.totals.items()})}
        )
        content["weight"] = MetricRecord({"num-examples": float(found.count)})
        return Message(content, reply_to=message)

    return app


class Exported(theirs.Strategy):
    """One of our strategies, as Flower drives one. Its state is ours, and is here."""

    def __init__(self, plan: Plan, first: Params, rounds: int) -> None:
        self.plan, self.rounds = plan, rounds
        self.state: ServerState = plan.start(first)

    def summary(self) -> None:
        """Say nothing: the plan says it."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the round's brief, to as many nodes as the plan asks."""
        return self._messages(server_round, "train", grid)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the model to be scored, when that is due."""
        last = server_round == self.rounds
        due = self.plan.evaluation.is_due(server_round, last=last)
        return self._messages(server_round, "evaluate", grid) if due else []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold in what is sound; raises `QuorumLost` if that is too little.

        Sites that failed, or whose update is malformed, do not count.
        """
        brief, why = self.plan.strategy.brief(self.state), dict[SiteId, str]()
        updates, counted = Updates(self.plan.reducer, reports(brief)), 0
        for site, reply in _in_order(replies):
            try:
                updates.add(_update(reply, server_round, site), brief)
                counted += 1
            except FedmlError as error:
                why[site] = str(error)
        if counted < self.plan.cohort.quorum:
            raise QuorumLost(
                f"round {server_round}: {counted} updates, quorum {self.plan.cohort.quorum}; {why}"
            )
        total = updates.result()
        self.state = self.plan.strategy.advance(self.state, total)
        metrics = {str(name): float(value) for name, value in total.metrics.items()}
        return _arrays(self.state.params), MetricRecord({**metrics, "updates": counted})

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the mean of each score over all rows that were scored."""
        brief, scores = Brief(self.state.params), Reports()
        for site, reply in _in_order(replies):
            with suppress(FedmlError):  # it does not count
                scores.add(_report(reply, server_round, site), brief)
        try:
            return MetricRecord({str(k): float(v) for k, v in scores.result().items()})
        except MalformedMessage:  # nobody was asked, or nobody has rows
            return None

    def _messages(self, number: int, kind: str, grid: Grid) -> list[Message]:
        brief = self.plan.strategy.brief(self.state)
        told = ConfigRecord({"round": number, "rule": brief.rule})
        told["settings"] = json.dumps({k: float(v) for k, v in brief.settings.items()})
        content = RecordDict({"brief": told, "model": _arrays(brief.params)})
        for name, slot in brief.slots.items():
            content[f"slot.{name}"] = _arrays(slot)
        cohort = self.plan.cohort
        while len(nodes := sorted(grid.get_node_ids())) < max(cohort.quorum, cohort.size):
            time.sleep(_LOOK)
        if cohort.size and kind == "train":
            chance = random.Random(f"{self.plan.seed}.{number}")
            nodes = sorted(chance.sample(nodes, cohort.size))
        return [Message(content, node, kind, group_id=str(number)) for node in nodes]


def _check(plan: Plan) -> None:
    """Raise `ConfigError` for what Flower's runtime cannot keep of a plan."""
    if plan.privacy.mode != "none":
        raise ConfigError(
            f"privacy={plan.privacy.mode}: the ledger that charges it is our sites'; run the plan "
            "on them, or export it with privacy=none"
        )
    if plan.secagg.is_on:
        raise ConfigError("secagg=sa1: its messages are between our own sites; export it without")
    if plan.parent or plan.cohort.sites:
        raise ConfigError("parent and cohort.sites name what is at a coordinator of ours")


def _task(plan: Plan, message: Message, context: Context) -> Task:
    """Return the task that a message is; a node's name follows from its partition."""
    told = message.content.config_records["brief"]
    site = SiteId(f"site-{context.node_config['partition-id']}")
    settings: Mapping[str, float] = json.loads(str(told["settings"]))
    brief = Brief(
        params_of(message.content.array_records["model"]),
        str(told["rule"]),
        settings,
        _parts(message.content, "slot."),
    )
    number = int(str(told["round"]))
    kind = "train" if message.metadata.message_type == "train" else "evaluate"
    id_ = TaskId(f"{plan.model}.{number}.{site}")
    return Task(id_, RunId(plan.model), number, site, kind, brief)  # type: ignore[arg-type]


def _file(context: Context, name: str) -> Path:
    path = context.node_config.get(name) or context.run_config.get(name)
    if not path:
        raise ConfigError(f"no file {name!r}: name it in node_config or in the app's settings")
    place = str(context.node_config["partition-id"])
    return Path(str(path).replace("{partition-id}", place))


def _in_order(replies: Iterable[Message]) -> list[tuple[SiteId, Message]]:
    """Return replies by node: they come in any order, and some reducers notice."""
    found = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
    return [(SiteId(f"node-{reply.metadata.src_node_id}"), reply) for reply in found]


def _update(reply: Message, number: int, site: SiteId) -> Update:
    content = _content(reply)
    try:
        weight = content.metric_records["weight"]["num-examples"]
        metrics = {k: float(str(v)) for k, v in content.metric_records["metrics"].items()}
        delta = params_of(content.array_records["delta"])
        slots = _parts(content, "slot.")
        return Update(
            TaskId(f"{number}.{site}"), number, site, delta, float(str(weight)), slots, metrics
        )
    except (KeyError, ValueError) as error:
        raise MalformedMessage(f"no update: {error}") from error


def _report(reply: Message, number: int, site: SiteId) -> Report:
    content = _content(reply)
    try:
        count = float(str(content.metric_records["weight"]["num-examples"]))
        totals = {k: float(str(v)) for k, v in content.metric_records["totals"].items()}
    except (KeyError, ValueError) as error:
        raise MalformedMessage(f"no report: {error}") from error
    return Report(TaskId(f"{number}.{site}"), number, site, totals, count)


def _content(reply: Message) -> RecordDict:
    if not reply.has_content():
        raise MalformedMessage(f"an error: {reply.error.reason}")
    return reply.content


def _parts(content: RecordDict, prefix: str) -> Slots:
    """Return the records whose names begin so as slots, by the rest of the name."""
    return {
        name.removeprefix(prefix): params_of(record)
        for name, record in content.array_records.items()
        if name.startswith(prefix)
    }


def _arrays(params: Params) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.detach().numpy()) for name, tensor in params.items()})
