"""Flower by its public interface: a ServerApp, a ClientApp and its Ray simulation."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.race import Gate
from benchmarks.workloads import WORKLOADS, Workload, accuracy

client = ClientApp()


@cache
def _data(name: str) -> tuple[Tensor, Tensor]:
    return WORKLOADS[name].data()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train the message's model on this node's rows, once."""
    torch.set_num_threads(1)
    name = os.environ["FEDML_RACE_WORKLOAD"]
    workload, user = WORKLOADS[name], int(context.node_config["partition-id"])
    (x, y), model = _data(name), workload.model()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=workload.lr)
    for batch in torch.randperm(workload.samples).split(workload.batch):
        optimizer.zero_grad()
        cross_entropy(model(x[user][batch]), y[user][batch]).backward()
        optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": workload.samples}),
        }
    )
    return Message(content=content, reply_to=message)


class _Gated(FedAvg):
    """Flower's FedAvg that holds every round until the race goes on."""

    def __init__(self, gate: Gate, workload: Workload) -> None:
        super().__init__(
            fraction_train=workload.cohort / workload.users,
            fraction_evaluate=0.0,
            min_train_nodes=workload.cohort,
            min_available_nodes=workload.users,
        )
        self._gate, self._workload = gate, workload

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate, report the round, and wait for the next."""
        came = list(replies)
        arrays, metrics = super().aggregate_train(server_round, came)
        good = sum(not reply.has_error() for reply in came)
        assert good == self._workload.cohort, f"{good} of {self._workload.cohort} nodes trained"
        self._gate.tell(0.0)
        while (asked := self._gate.wait()) == "score":
            model = self._workload.model()
            assert arrays is not None
            model.load_state_dict(arrays.to_torch_state_dict())
            self._gate.tell(accuracy(model, self._workload))
        if asked == "stop":
            os._exit(0)
        return arrays, metrics


def main() -> None:
    """Race until told to stop."""
    address, name, workers, precision = sys.argv[1:]
    assert precision == "fp32"
    os.environ["FEDML_RACE_WORKLOAD"] = name
    gate, workload = Gate(address), WORKLOADS[name]
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        first = ArrayRecord(workload.model().state_dict())
        _Gated(gate, workload).start(grid=grid, initial_arrays=first, num_rounds=10_000)

    from benchmarks.racers.flower import client as importable  # what runs as __main__ is not

    gate.wait()
    run_simulation(
        server_app=server,
        client_app=importable,
        num_supernodes=workload.users,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": int(workers), "include_dashboard": False},
        },
    )


if __name__ == "__main__":
    main()
