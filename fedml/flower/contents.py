"""What a Flower message carries: copied, told apart by a digest, and as our `Params`."""

from __future__ import annotations

from copy import copy

import numpy as np
import torch
from blake3 import blake3
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedml.errors import MalformedUpdate
from fedml.params import Params


def copied(content: RecordDict) -> RecordDict:
    """Return records of their own; arrays share their bytes, which nobody can change."""
    return RecordDict({name: _copied(record) for name, record in content.items()})


def _copied(
    record: ArrayRecord | ConfigRecord | MetricRecord,
) -> ArrayRecord | ConfigRecord | MetricRecord:
    if isinstance(record, ArrayRecord):
        return ArrayRecord(
            {name: Array(a.dtype, tuple(a.shape), a.stype, a.data) for name, a in record.items()}
        )
    if isinstance(record, MetricRecord):
        return MetricRecord({name: copy(value) for name, value in record.items()})
    return ConfigRecord({name: copy(value) for name, value in record.items()})


def digest(content: RecordDict) -> bytes:
    """Return 32 bytes that tell contents apart: names, types and values, in their order."""
    total = blake3()
    for name, record in content.items():
        total.update(f"{type(record).__name__} {name!r}\n".encode())
        for key, value in record.items():
            if isinstance(value, Array):
                total.update(f"{key!r} {value.dtype} {value.shape} {value.stype}\n".encode())
                total.update(value.data)
            else:
                total.update(f"{key!r} {value!r}\n".encode())
    return total.digest()


def question(message: Message, known: dict[int, bytes]) -> bytes:
    """Return 32 bytes that tell what is asked: kind, round and content.

    The messages of a round mostly share their content; `known` has digests by its identity.
    """
    content, about = message.content, message.metadata
    if id(content) not in known:
        known[id(content)] = digest(content)
    kind = f"{about.message_type!r} {about.group_id!r}\n".encode()
    return blake3(kind + known[id(content)]).digest()


def params_of(arrays: ArrayRecord) -> Params:
    """Return a model's arrays as tensors; raises `MalformedUpdate` on what is no plain numbers."""
    tensors = dict[str, torch.Tensor]()
    for name, array in arrays.items():
        try:
            # a copy: what numpy reads from bytes may not be written to
            tensors[name] = torch.from_numpy(np.array(array.numpy()))
        except (TypeError, ValueError) as error:
            raise MalformedUpdate(f"array {name!r} of {array.dtype}: {error}") from error
    return Params(tensors)
