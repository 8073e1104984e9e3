"""A small way to ask a served model: what `fedml predict` does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from http.client import HTTPException, InvalidURL
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from fedml.errors import ConfigError, MalformedMessage, TaskFailed, Unreachable

Numbers = Sequence[Any]  # numbers, nested as deep as the tensor has dimensions


def predict(
    url: str, model: str, rows: Numbers, *, token: str = "", timeout: float = 30.0
) -> Mapping[str, Numbers]:
    """Return a model's outputs, by name, for rows of its one input; nested as the tensors are.

    `url` is the REST address, as in `http://127.0.0.1:8000`. Raises `Unreachable` if nobody
    answers or too much waits there, `ConfigError` with the endpoint's reason if it refuses.
    """
    path = f"{url.rstrip('/')}/v2/models/{quote(model, safe='')}"
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"address {url!r}: start it with http:// or https://")
    inputs = _ask(path, None, token, timeout)["inputs"]
    if len(inputs) != 1:
        raise ConfigError(f"model {model!r} takes {len(inputs)} inputs; use an OIP client for it")
    request = {**inputs[0], "shape": _shape(rows), "data": rows}
    answer = _ask(f"{path}/infer", {"inputs": [request]}, token, timeout)
    return {out["name"]: _nested(out["data"], out["shape"]) for out in answer["outputs"]}


def _ask(url: str, body: object, token: str, timeout: float) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, headers), timeout=timeout) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except HTTPError as error:
        raise _refusal(url, error) from error
    except InvalidURL as error:
        raise ConfigError(f"address {url!r}: {error}") from error
    except (URLError, OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Unreachable(f"{url}: {reason}; is it serving, and is the address right?") from error
    except ValueError as error:
        raise MalformedMessage(f"{url}: answers with something else than JSON") from error


def _refusal(url: str, error: HTTPError) -> ConfigError | Unreachable | TaskFailed:
    try:
        reason = str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        reason = f"HTTP status {error.code}"
    text = f"{url}: {reason}"
    if error.code in (429, 502, 503, 504):
        return Unreachable(text)
    return TaskFailed(text) if error.code >= 500 else ConfigError(text)


def _shape(rows: Numbers) -> list[int]:
    shape = []
    part: object = rows
    while isinstance(part, Sequence) and not isinstance(part, str):
        shape.append(len(part))
        part = part[0] if part else None
    return shape


def _nested(flat: Numbers, shape: Sequence[int]) -> Numbers:
    for size in reversed(shape[1:]):
        flat = [flat[start : start + size] for start in range(0, len(flat), size)]
    return flat
