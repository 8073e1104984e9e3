"""A ClientApp for tests, whose answers are functions of what it is asked and who it is."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

FIRST = [np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(3, 4), np.ones(5, np.float32)]


def trained(arrays: ArrayRecord, site: int) -> RecordDict:
    """Return what a site makes of a model: a step towards numbers of its own."""
    values = arrays.to_numpy_ndarrays()
    chance = np.random.default_rng(site)
    moved = [
        (v - np.float32(0.1) * (v - chance.normal(size=v.shape))).astype(v.dtype) for v in values
    ]
    figures = MetricRecord({"num-examples": 10 + site, "train_loss": float(np.abs(moved[0]).sum())})
    return RecordDict({"arrays": ArrayRecord(moved), "metrics": figures})


def scored(arrays: ArrayRecord, site: int) -> RecordDict:
    """Return what a site says of a model."""
    loss = float(sum(np.abs(v).sum() for v in arrays.to_numpy_ndarrays())) + site
    return RecordDict({"metrics": MetricRecord({"num-examples": 10 + site, "eval_loss": loss})})


def stock_app(mods: list[Mod] | None = None) -> ClientApp:
    """Return a ClientApp that trains and scores, and is Flower's own in all else."""
    app = ClientApp()

    @app.train(mods=mods)
    def train(message: Message, context: Context) -> Message:
        site = int(context.node_config["partition-id"])
        content = trained(message.content.array_records["arrays"], site)
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        site = int(context.node_config["partition-id"])
        return Message(scored(message.content.array_records["arrays"], site), reply_to=message)

    return app
