"""Every touch of Flower that is not its public interface, and nothing else.

`tests/flower/test_private.py` is the contract: it fails first when a new Flower moves one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import wraps
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.app.exception import AppExitException
from flwr.app.message import make_message
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import (
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.serverapp.strategy import Result, Strategy
from flwr.supercore.run import Run as Run  # again: `Grid` names it
from flwr.supercore.task_identity import TaskIdentity

from fedml.errors import MalformedMessage

COORDINATOR = SUPERLINK_NODE_ID  # the node whose word a ServerApp's messages are
Stop = AppExitException  # how Flower's own strategies give up, with a sentence for a person
RAISED: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
ABSENT: int = ErrorCode.NODE_UNAVAILABLE


def empty_run(number: int) -> Run:
    """Return a run that nothing but its number is known of."""
    return Run.create_empty(number)


def act_as(run: int, node: int) -> None:
    """Let messages that this process makes from now on be of `run` and from `node`.

    It holds for the whole process: one run at a time.
    """
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, node, node


def give_id(message: Message, id_: str) -> None:
    """Give a message its id; Flower has no way to do so from outside."""
    message.metadata.__dict__["_message_id"] = id_


def received(message: Message, content: RecordDict) -> Message:
    """Return the message as its receiver has it: about the same, with `content` as its own."""
    made: Message = make_message(copy(message.metadata), content)
    return made


def message_bytes(message: Message) -> bytes:
    """Return the message as Flower sends it."""
    data: bytes = message_to_proto(message).SerializeToString(deterministic=True)
    return data


def read_message(data: bytes) -> Message:
    """Return what `message_bytes` was given."""
    return message_from_proto(MessageProto.FromString(data))


def question_bytes(message: Message) -> bytes:
    """Return the message as Flower sends it, but for whom it is to, its id and the time.

    So messages of equal content are equal, and so are those of a replay.
    """
    proto = message_to_proto(message)
    for name in ("message_id", "dst_node_id", "created_at"):
        proto.metadata.ClearField(name)
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def addressed(data: bytes, node: int, id_: str, now: float) -> Message:
    """Return what `question_bytes` was given, as a message to `node`."""
    proto = MessageProto.FromString(data)
    proto.metadata.dst_node_id, proto.metadata.message_id = node, id_
    proto.metadata.created_at = now
    return message_from_proto(proto)


def read_reply(data: bytes, message: Message) -> Message:
    """Return a foreign reply to `message`: content or error, and nothing else that it says.

    Raises `MalformedMessage` if it is none.
    """
    try:
        found = message_from_proto(MessageProto.FromString(data))
        return Message(found.content if found.has_content() else found.error, reply_to=message)
    except Exception as error:  # Flower does not say what its readers raise
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise MalformedMessage(f"{len(data)} bytes are no message ({line:.100})") from error


def context_bytes(context: Context) -> bytes:
    """Return the context, state and all, as Flower sends it."""
    data: bytes = context_to_proto(context).SerializeToString(deterministic=True)
    return data


def read_context(data: bytes) -> Context:
    """Return what `context_bytes` was given."""
    return context_from_proto(ContextProto.FromString(data))


@contextmanager
def overheard(tell: Callable[[Result], None]) -> Iterator[None]:
    """Tell of each result that a strategy's `start` returns meanwhile.

    A ServerApp need not hand it on, and few do.
    """
    start = Strategy.start

    @wraps(start)
    def told(self: Strategy, *args: Any, **kwargs: Any) -> Result:  # noqa: ANN401 - whatever it takes
        result = start(self, *args, **kwargs)
        tell(result)
        return result

    Strategy.start = told  # type: ignore[method-assign]
    try:
        yield
    finally:
        Strategy.start = start  # type: ignore[method-assign]
