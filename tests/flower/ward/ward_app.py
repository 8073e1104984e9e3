"""A Flower app whose sites count their messages, mark each, wait where told, and raise where told.

What a site has counted is in its context's state, so it tells whether that was lost or led twice.
"""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    settings, place = context.run_config, int(context.node_config["partition-id"])
    before = context.state.metric_records.get("seen", MetricRecord({"messages": 0}))
    seen = int(str(before["messages"])) + 1
    context.state["seen"] = MetricRecord({"messages": seen})
    _mark(context, f"begun {seen}")
    while settings["hold"] == seen and not Path(str(settings["marks"]), f"go-{place}").exists():
        time.sleep(0.01)
    if settings["raise-at"] == seen and place == 1:
        raise ValueError("no such ward")
    [numbers] = message.content.array_records["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": 1 + place, "messages": seen})
    moved = (numbers + 1 + place).astype(np.float32)
    content = RecordDict({"arrays": ArrayRecord([moved]), "metrics": metrics})
    _mark(context, f"done {seen}")
    return Message(content, reply_to=message)


def _mark(context: Context, text: str) -> None:
    place = context.node_config["partition-id"]
    with Path(str(context.run_config["marks"]), f"site-{place}").open("a") as file:
        file.write(text + "\n")


@server.main()
def main(grid: Grid, context: Context) -> None:
    FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1).start(
        grid,
        ArrayRecord([np.zeros(3, np.float32)]),
        num_rounds=int(context.run_config["rounds"]),
        timeout=float(context.run_config["timeout"]),
    )
