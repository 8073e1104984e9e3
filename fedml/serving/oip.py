"""The Open Inference Protocol v2 apart from any wire: tensors, requests, answers, refusals.

Both faces turn their bytes into a `Question`, the engine gives an `Answer`, and each kind of
error has one HTTP and one gRPC status (`STATUS`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np

from fedml.errors import (
    FedmlError,
    MalformedMessage,
    Overloaded,
    PermissionDenied,
    Refused,
    TaskFailed,
    UnknownModel,
)
from fedml.protocol.messages import Serving
from fedml.releases.manifest import TensorSpec
from fedml.releases.session import Array, Tensors

DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
STATUS: Sequence[tuple[type[FedmlError], int, grpc.StatusCode]] = (
    (MalformedMessage, 400, grpc.StatusCode.INVALID_ARGUMENT),
    (PermissionDenied, 401, grpc.StatusCode.UNAUTHENTICATED),
    (UnknownModel, 404, grpc.StatusCode.NOT_FOUND),
    (Refused, 413, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Overloaded, 429, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TaskFailed, 500, grpc.StatusCode.INTERNAL),
    (FedmlError, 500, grpc.StatusCode.INTERNAL),
)
_MAX_DIMS = 16


@dataclass(frozen=True)
class Limits:
    """How much one request may ask, and how many may wait.

    `rows` and `bytes` bound one request; `queue` the requests that wait for one model; `batch`
    the rows computed together, of which loading may choose fewer.
    """

    rows: int = 4096
    bytes: int = 64 * 2**20
    queue: int = 1024
    batch: int = 64


@dataclass(frozen=True)
class Question:
    """One inference request; `version` "" means the live one, no `outputs` means all."""

    model: str
    inputs: Tensors
    version: str = ""
    id: str = ""
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a version answered."""

    model: str
    version: str
    outputs: Tensors
    id: str = ""


@dataclass(frozen=True)
class Card:
    """A model as clients see it: loaded versions, and the signature of one of them."""

    name: str
    versions: tuple[str, ...]
    inputs: tuple[TensorSpec, ...] = field(default=())
    outputs: tuple[TensorSpec, ...] = field(default=())
    platform: str = "onnxruntime_onnx"


def status(error: FedmlError) -> tuple[int, grpc.StatusCode]:
    """Return the HTTP and the gRPC status of an error."""
    return next((http, code) for kind, http, code in STATUS if isinstance(error, kind))


def from_bytes(spec: TensorSpec, data: bytes | memoryview) -> Array:
    """Return the tensor whose little-endian row-major bytes are `data`.

    Raises `MalformedMessage` if the length does not fit datatype and shape.
    """
    dtype, count = DTYPES[spec.datatype], _count(spec)
    if len(data) != count * dtype.itemsize:
        raise MalformedMessage(
            f"input {spec.name!r}: {len(data)} bytes, {spec.datatype} of shape "
            f"{list(spec.shape)} takes {count * dtype.itemsize}"
        )
    if dtype == np.bool_:
        flags: Array = np.frombuffer(data, np.uint8) != 0
        return flags.reshape(spec.shape)
    array = np.frombuffer(data, dtype).reshape(spec.shape)
    return array if array.flags.aligned else array.copy()


def from_values(spec: TensorSpec, values: object) -> Array:
    """Return the tensor that a JSON array, nested or flat, holds in row-major order.

    Raises `MalformedMessage` unless each value is exactly of the datatype: no text, no null, no
    fraction for an integer, nothing out of range.
    """
    dtype = DTYPES[spec.datatype]
    try:
        raw = np.asarray(values)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise MalformedMessage(f"input {spec.name!r}: data is no regular array") from error
    fits = {"b": "b", "u": "iu", "i": "iu", "f": "iuf"}[dtype.kind]
    if raw.size and raw.dtype.kind not in fits:
        raise MalformedMessage(
            f"input {spec.name!r}: data holds values that are no {spec.datatype}"
        )
    if raw.size != _count(spec):
        raise MalformedMessage(
            f"input {spec.name!r}: {raw.size} values for shape {list(spec.shape)}"
        )
    if dtype.kind in "iu" and raw.size:
        bounds = np.iinfo(dtype.name)
        if int(raw.min()) < bounds.min or int(raw.max()) > bounds.max:
            raise MalformedMessage(
                f"input {spec.name!r}: a value is out of {spec.datatype}'s range"
            )
    try:
        with np.errstate(over="raise"):
            return raw.astype(dtype).reshape(spec.shape)
    except FloatingPointError as error:
        raise MalformedMessage(
            f"input {spec.name!r}: a value is out of {spec.datatype}'s range"
        ) from error


def datatype_of(array: Array) -> str:
    """Return the protocol's name of an array's dtype; `TaskFailed` if it has none."""
    for name, dtype in DTYPES.items():
        if dtype == array.dtype:
            return name
    raise TaskFailed(f"the model answers with {array.dtype}, which the protocol cannot carry")


def index_rows(serving: Iterable[Serving]) -> list[tuple[str, str, str, str]]:
    """Return name, version, state and reason of each model, as a repository index lists them."""
    states = {"live": "READY", "refused": "UNAVAILABLE", "none": "UNAVAILABLE"}
    return [(s.model, str(s.version), states[s.state], s.detail) for s in serving]


def claimed(name: str, datatype: str, shape: Sequence[int]) -> TensorSpec:
    """Return what a request claims of an input; raises `MalformedMessage` if it cannot be."""
    if datatype not in DTYPES:
        raise MalformedMessage(
            f"input {name[:80]!r}: datatype {datatype[:20]!r} is not served; use {[*DTYPES]}"
        )
    if not name or len(shape) > _MAX_DIMS or not all(0 <= size < 2**31 for size in shape):
        raise MalformedMessage(f"input {name[:80]!r}: shape {list(shape)[:_MAX_DIMS]}")
    return TensorSpec(name, datatype, tuple(shape))


def check(question: Question, card: Card, limits: Limits) -> int:
    """Return how many rows are asked; raises if question and model do not fit.

    `MalformedMessage` for a wrong name, datatype or shape, `Refused` for too many rows.
    """
    expected = {spec.name: spec for spec in card.inputs}
    if question.inputs.keys() != expected.keys():
        raise MalformedMessage(
            f"model {card.name!r} takes the inputs {sorted(expected)}, "
            f"not {sorted(n[:80] for n in question.inputs)}"
        )
    unknown = set(question.outputs) - {spec.name for spec in card.outputs}
    if unknown:
        raise MalformedMessage(
            f"model {card.name!r} has the outputs {sorted(s.name for s in card.outputs)}, "
            f"not {sorted(n[:80] for n in unknown)}"
        )
    counts = set()
    for name, array in question.inputs.items():
        spec = expected[name]
        if array.dtype != DTYPES[spec.datatype]:
            raise MalformedMessage(f"input {name!r} is {spec.datatype}, not {datatype_of(array)}")
        if len(array.shape) != len(spec.shape) or any(
            want not in (-1, size) for want, size in zip(spec.shape, array.shape, strict=True)
        ):
            raise MalformedMessage(
                f"input {name!r} has the shape {list(spec.shape)}, not {list(array.shape)}"
            )
        if 0 in array.shape:
            raise MalformedMessage(f"input {name!r} is empty: shape {list(array.shape)}")
        counts.add(array.shape[0] if array.shape else 1)
    rows = max(counts, default=1)
    if len(counts) > 1 and all(spec.shape[:1] == (-1,) for spec in card.inputs):
        raise MalformedMessage(f"the inputs have {sorted(counts)} rows; give all the same number")
    if rows > limits.rows:
        raise Refused(f"{rows} rows in one request, the limit is {limits.rows}; split it")
    return rows


def _count(spec: TensorSpec) -> int:
    return math.prod(spec.shape)
