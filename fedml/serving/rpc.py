"""The Open Inference Protocol v2 over gRPC; answers are always raw bytes, as clients prefer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
import numpy as np
from google.protobuf.message import Message

from fedml import __version__
from fedml.errors import FedmlError, MalformedMessage, UnknownModel
from fedml.releases.manifest import TensorSpec
from fedml.releases.session import Array
from fedml.serving._generated import open_inference_grpc_pb2 as pb
from fedml.serving.engine import Engine
from fedml.serving.oip import (
    Answer,
    Question,
    claimed,
    datatype_of,
    from_bytes,
    from_values,
    index_rows,
    status,
)

SERVICE = "inference.GRPCInferenceService"
_Q = TypeVar("_Q", bound=Message)
_A = TypeVar("_A", bound=Message)
_Specs = tuple[TensorSpec, ...]
_Tensor = pb.ModelMetadataResponse.TensorMetadata
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


def build_handler(engine: Engine) -> grpc.GenericRpcHandler[Message, Message]:
    """Return the gRPC face of `engine`; an error is a status and one line."""
    service = _Service(engine)
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "ServerLive": _method(service.live, pb.ServerLiveRequest),
            "ServerReady": _method(service.ready, pb.ServerReadyRequest),
            "ServerMetadata": _method(service.metadata, pb.ServerMetadataRequest),
            "ModelReady": _method(service.model_ready, pb.ModelReadyRequest),
            "ModelMetadata": _method(service.model_metadata, pb.ModelMetadataRequest),
            "ModelInfer": _method(service.infer, pb.ModelInferRequest),
            "RepositoryIndex": _method(service.index, pb.RepositoryIndexRequest),
        },
    )


def _method(
    act: Callable[[_Q], Awaitable[_A]], question: type[_Q]
) -> grpc.RpcMethodHandler[_Q, _A]:
    async def handle(request: _Q, context: grpc.aio.ServicerContext[_Q, _A]) -> _A:
        try:
            return await act(request)
        except FedmlError as error:
            await context.abort(status(error)[1], str(error))

    return grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=question.FromString,
        response_serializer=lambda answer: answer.SerializeToString(),
    )


class _Service:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def live(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ready(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._engine.is_ready())

    async def metadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="fedml", version=__version__, extensions=["model_repository"]
        )

    async def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        try:
            self._engine.card(request.name, request.version)
        except UnknownModel:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        card = self._engine.card(request.name, request.version)
        return pb.ModelMetadataResponse(
            name=card.name,
            versions=card.versions,
            platform=card.platform,
            inputs=_tensors(card.inputs),
            outputs=_tensors(card.outputs),
        )

    async def index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        rows = [
            pb.RepositoryIndexResponse.ModelIndex(name=n, version=v, state=state, reason=reason)
            for n, v, state, reason in index_rows(self._engine.serving())
            if state == "READY" or not request.ready
        ]
        return pb.RepositoryIndexResponse(models=rows)

    async def infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        return _render(await self._engine.infer(_parse(request)))


def _parse(request: pb.ModelInferRequest) -> Question:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise MalformedMessage(
            f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs; give one for each"
        )
    inputs: dict[str, Array] = {}
    for place, tensor in enumerate(request.inputs):
        spec = claimed(tensor.name, tensor.datatype, tensor.shape)
        if spec.name in inputs:
            raise MalformedMessage(f"input {spec.name[:80]!r} comes twice")
        inputs[spec.name] = from_bytes(spec, raw[place]) if raw else _typed(spec, tensor)
    names = tuple(output.name for output in request.outputs)
    return Question(request.model_name, inputs, request.model_version, request.id, names)


def _typed(spec: TensorSpec, tensor: pb.ModelInferRequest.InferInputTensor) -> Array:
    if spec.datatype not in _CONTENTS:
        raise MalformedMessage(f"input {spec.name!r}: send {spec.datatype} as raw_input_contents")
    return from_values(spec, list(getattr(tensor.contents, _CONTENTS[spec.datatype])))


def _render(answer: Answer) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(
        model_name=answer.model, model_version=answer.version, id=answer.id
    )
    for name, array in answer.outputs.items():
        response.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        response.raw_output_contents.append(np.ascontiguousarray(array).tobytes())
    return response


def _tensors(specs: _Specs) -> list[_Tensor]:
    return [_Tensor(name=s.name, datatype=s.datatype, shape=s.shape) for s in specs]
