"""The Open Inference Protocol v2 over HTTP: JSON, and Triton's binary extension of it.

Binary tensors follow the JSON in the same body; `Inference-Header-Content-Length` says where.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import structlog
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fedml import __version__
from fedml.errors import FedmlError, MalformedMessage, Refused, TaskFailed
from fedml.releases.manifest import TensorSpec
from fedml.releases.session import Array
from fedml.serving.engine import Engine
from fedml.serving.oip import (
    Answer,
    Card,
    Question,
    claimed,
    datatype_of,
    from_bytes,
    from_values,
    index_rows,
    status,
)

_HEADER = "Inference-Header-Content-Length"
_log = structlog.get_logger(__name__)
_Json = dict[str, Any]


def build_app(engine: Engine, unready: Callable[[], str] = lambda: "") -> FastAPI:
    """Return the HTTP face of `engine`; every error is `{"error": one line}`.

    /readyz speaks of the program: `unready` says why it takes no work. Whether there is a model
    to ask is another question, with a path of its own.
    """
    app = FastAPI(title="fedml", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(FedmlError, _refuse)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _break)
    _add_health(app, engine, unready)
    _add_models(app, engine)
    return app


def _add_health(app: FastAPI, engine: Engine, unready: Callable[[], str]) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        return Response("ok\n")

    @app.get("/readyz")
    async def readyz() -> Response:
        reason = unready()
        return Response(f"{reason or 'ok'}\n", status_code=503 if reason else 200)

    @app.get("/v2/health/live")
    async def live() -> Response:
        return Response()

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        return Response(status_code=200 if engine.is_ready() else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v2")
    async def metadata() -> Response:
        return _json(
            {
                "name": "fedml",
                "version": __version__,
                "extensions": ["binary_tensor_data", "model_repository"],
            }
        )

    @app.post("/v2/repository/index")
    async def index() -> Response:
        return _json([_index_row(*row) for row in index_rows(engine.serving())])


def _add_models(app: FastAPI, engine: Engine) -> None:
    @app.get("/v2/models/{model}/versions/{version}/ready")
    @app.get("/v2/models/{model}/ready")
    async def ready(model: str, version: str = "") -> Response:
        engine.card(model, version)
        return Response()

    @app.get("/v2/models/{model}/versions/{version}")
    @app.get("/v2/models/{model}")
    async def metadata(model: str, version: str = "") -> Response:
        return _json(_card(engine.card(model, version)))

    @app.post("/v2/models/{model}/versions/{version}/infer")
    @app.post("/v2/models/{model}/infer")
    async def infer(request: Request, model: str, version: str = "") -> Response:
        body = await _body(request, engine.limits.bytes)
        asked, binary = parse(body, request.headers.get(_HEADER), model, version)
        return render(await engine.infer(asked), binary)


def parse(
    body: bytes, header: str | None, model: str, version: str
) -> tuple[Question, Mapping[str, bool]]:
    """Read an inference request; raises `MalformedMessage` with what is wrong with it.

    `header` is the length of the JSON part, None if it is the whole body. The mapping says which
    outputs are wanted in binary; the key "" holds for those not named.
    """
    end = len(body)
    if header is not None:
        if not header.isascii() or not header.isdigit() or int(header) > len(body):
            raise MalformedMessage(f"{_HEADER} {header[:20]!r} in a body of {len(body)} bytes")
        end = int(header)
    try:
        raw = json.loads(body[:end])
        names, binary = _wanted(raw)
        inputs = _inputs(raw["inputs"], memoryview(body)[end:])
        asked = Question(model, inputs, version, str(raw.get("id", "")), names)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MalformedMessage(
            f"the body is no inference request: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    return asked, binary


def _wanted(raw: _Json) -> tuple[tuple[str, ...], dict[str, bool]]:
    binary = {"": bool(raw.get("parameters", {}).get("binary_data_output", False))}
    names = []
    for output in raw.get("outputs", []):
        name, parameters = str(output["name"]), output.get("parameters", {})
        if "classification" in parameters or "shared_memory_region" in parameters:
            raise MalformedMessage(f"output {name[:80]!r}: only plain tensors are served")
        names.append(name)
        binary[name] = bool(parameters.get("binary_data", binary[""]))
    return tuple(names), binary


def _inputs(raw: list[_Json], tail: memoryview) -> dict[str, Array]:
    found: dict[str, Array] = {}
    start = 0
    for tensor in raw:
        shape = tensor["shape"]
        if not all(type(size) is int for size in shape):
            raise TypeError(f"shape {shape}")
        spec = claimed(str(tensor["name"]), str(tensor["datatype"]), shape)
        size = tensor.get("parameters", {}).get("binary_data_size")
        if spec.name in found:
            raise ValueError(f"input {spec.name!r} comes twice")
        if size is None:
            found[spec.name] = from_values(spec, tensor["data"])
            continue
        if type(size) is not int or not 0 <= size <= len(tail) - start:
            raise ValueError(f"input {spec.name!r}: binary_data_size {size}")
        found[spec.name] = from_bytes(spec, tail[start : start + size])
        start += size
    if start != len(tail):
        raise ValueError(f"{len(tail) - start} bytes belong to no input")
    return found


def render(answer: Answer, binary: Mapping[str, bool]) -> Response:
    """Write an answer; raises `TaskFailed` for NaN or infinity, which JSON cannot carry."""
    outputs, tail = [], []
    for name, array in answer.outputs.items():
        shape = list(array.shape)
        entry: _Json = {"name": name, "datatype": datatype_of(array), "shape": shape}
        if binary.get(name, binary[""]):
            data = np.ascontiguousarray(array).tobytes()
            tail.append(data)
            entry["parameters"] = {"binary_data_size": len(data)}
        else:
            entry["data"] = array.ravel().tolist()
        outputs.append(entry)
    raw = {"model_name": answer.model, "model_version": answer.version, "outputs": outputs}
    if answer.id:
        raw["id"] = answer.id
    try:
        head = json.dumps(raw, allow_nan=False).encode()
    except ValueError as error:
        raise TaskFailed(
            "the answer holds NaN or infinity, which JSON cannot carry; check the input, or ask "
            "for binary output"
        ) from error
    if not tail:
        return Response(head, media_type="application/json")
    return Response(
        b"".join([head, *tail]),
        media_type="application/octet-stream",
        headers={_HEADER: str(len(head))},
    )


async def _body(request: Request, limit: int) -> bytes:
    if "content-encoding" in request.headers:
        raise MalformedMessage("compressed bodies are not served; send it plain")
    pieces, size = [], 0
    try:
        async for piece in request.stream():
            size += len(piece)
            if size > limit:
                raise Refused(f"a body of more than {limit} bytes; split the request")
            pieces.append(piece)
    except ClientDisconnect as error:
        raise MalformedMessage("the client left in the middle of its request") from error
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _card(card: Card) -> _Json:
    def tensors(specs: tuple[TensorSpec, ...]) -> list[_Json]:
        return [
            {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
            for spec in specs
        ]

    return {
        "name": card.name,
        "versions": list(card.versions),
        "platform": card.platform,
        "inputs": tensors(card.inputs),
        "outputs": tensors(card.outputs),
    }


def _index_row(name: str, version: str, state: str, reason: str) -> _Json:
    return {"name": name, "version": version, "state": state, "reason": reason}


def _json(value: object, code: int = 200) -> Response:
    return Response(json.dumps(value), code, media_type="application/json")


async def _refuse(_: Request, error: Exception) -> Response:
    return _json({"error": str(error)}, status(cast("FedmlError", error))[0])


async def _not_found(_: Request, error: Exception) -> Response:
    found = cast("HTTPException", error)
    return _json({"error": f"{found.detail}: not part of what is served here"}, found.status_code)


async def _break(_: Request, error: Exception) -> Response:
    _log.error("request broke", reason=f"{type(error).__name__}: {error}")
    return _json({"error": "the server failed; its log says why"}, 500)
