"""Flower's SecAgg+ in this process: its workflow and its mod, without simulation or network.

What stands in for the network hands each message straight to the mod. Flower's own classes do the
rest; what they do beside cryptography (records to arrays and back) takes a few milliseconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from io import BytesIO
from typing import NoReturn, cast
from uuid import uuid4

import flwr.compat.common.recorddict_compat as compat
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters
from flwr.server import SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.compat import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

NEIGHBOURS = 15
_CLIP = 0.5


def play(base: NDArray[np.float32], sites: int) -> float:
    """Return the CPU seconds of one round over `sites` that each have `base` to sum."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    parameters = ndarrays_to_parameters([base])
    nodes = range(1000, 1000 + sites)
    manager = SimpleClientManager()
    for node in nodes:
        manager.register(_Proxy(node))
    strategy = FedAvg(min_fit_clients=sites, min_available_clients=sites)
    state = RecordDict()
    state[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    state[MAIN_PARAMS_RECORD] = compat.parameters_to_arrayrecord(parameters, True)
    whole = Context(1, 1, {}, state, {})
    context = LegacyContext(whole, strategy=strategy, client_manager=manager)
    workflow = SecAggPlusWorkflow(
        min(NEIGHBOURS, sites) if sites > NEIGHBOURS + 1 else 1.0,
        min(NEIGHBOURS, sites) // 2 + 1,
        clipping_range=_CLIP,
    )
    start = time.process_time()
    workflow(cast(Grid, _Wire(nodes, parameters)), context)
    seconds = time.process_time() - start
    got = compat.arrayrecord_to_parameters(context.state.array_records[MAIN_PARAMS_RECORD], True)
    array = np.load(BytesIO(got.tensors[0]))
    assert np.abs(array - base).max() < 1e-3, "Flower's sum is not the mean"
    return seconds


class _Proxy(ClientProxy):
    """A node's name: the workflow asks for no more."""

    def __init__(self, node: int) -> None:
        super().__init__(str(node))
        self.node_id = node

    def _nothing(self, *_: object, **__: object) -> NoReturn:
        raise NotImplementedError

    get_properties = get_parameters = fit = evaluate = reconnect = _nothing


class _Wire:
    """A `Grid` of nodes that are here."""

    def __init__(self, nodes: Iterable[int], parameters: Parameters) -> None:
        self._contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in nodes}
        status = Status(Code.OK, "")
        self._result = compat.fitres_to_recorddict(FitRes(status, parameters, 1000, {}), True)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Let each message's node answer it."""
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid4().hex  # there is no setter
            message.content = _own(message.content)
            context = self._contexts[message.metadata.dst_node_id]
            replies.append(secaggplus_mod(message, context, self._train))
        return replies

    def _train(self, message: Message, _: Context) -> Message:
        return Message(_own(self._result), reply_to=message)


def _own(content: RecordDict) -> RecordDict:
    """Return the same records for a node of its own: the mod takes things out of them."""
    records: dict[str, ArrayRecord | MetricRecord | ConfigRecord] = {}
    records |= {name: ArrayRecord(dict(r)) for name, r in content.array_records.items()}
    records |= {name: MetricRecord(dict(r)) for name, r in content.metric_records.items()}
    records |= {name: ConfigRecord(dict(r)) for name, r in content.config_records.items()}
    return RecordDict(records)
