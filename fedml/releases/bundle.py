"""From trained parameters to a bundle: weights to train on, ONNX to serve, golden answers to check.

`build` loads torch and the ONNX exporter, takes seconds, and is meant for a child process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedml import __version__, durable
from fedml.errors import ConfigError, TaskFailed, Untrusted
from fedml.params import Params, encode
from fedml.releases.card import CARD
from fedml.releases.manifest import (
    ENVIRONMENT,
    GOLDEN,
    MANIFEST,
    MODEL,
    WEIGHTS,
    Environment,
    Manifest,
    TensorSpec,
    fingerprint,
)
from fedml.releases.session import Session, agree, rehearse

GOLDEN_ROWS = 32
_OPSET = 20
_INPUT = "input"
_DATATYPES = {
    torch.bool: "BOOL",
    torch.float16: "FP16",
    torch.float32: "FP32",
    torch.float64: "FP64",
    torch.int32: "INT32",
    torch.int64: "INT64",
}


def build(
    folder: Path,
    module: torch.nn.Module,
    params: Params,
    example: Tensor,
    facts: Manifest,
    outputs: Sequence[str] = ("output",),
    card: str = "",
) -> Manifest:
    """Write the bundle of `module` with `params` into the empty `folder`; return its manifest.

    `facts` is the manifest as far as it is known: files, signature and environment are filled
    in. `example` is one float32 or int64 tensor of rows `[n, ...]` that hold no private data;
    its first rows become the golden inputs. The module is put into eval mode and keeps `params`;
    it returns one tensor for each name in `outputs`, each with a row for each input row. `card`
    is the version's privacy card.

    Raises `ConfigError` if the arguments do not fit together, `TaskFailed` if the exporter fails
    or the ONNX model answers differently from torch, or a row depends on the
    others in its batch, by more than 1e-4.
    """
    _load(module, params, example)
    golden = example[:GOLDEN_ROWS].detach().cpu()
    answers = _answers(module, golden, outputs)
    durable.replace(folder / WEIGHTS, b"".join(encode({"": params})))
    _export(folder / MODEL, module, golden, outputs)
    _check_export(folder / MODEL, module, golden, outputs)
    _write_golden(folder / GOLDEN, golden, dict(zip(outputs, answers, strict=True)))
    environment, packages = Environment.observe(__version__)
    durable.replace(folder / ENVIRONMENT, packages.encode())
    names = [WEIGHTS, MODEL, GOLDEN, ENVIRONMENT]
    if card:
        durable.replace(folder / CARD, card.encode())
        names.append(CARD)
    manifest = dataclasses.replace(
        facts,
        inputs=(_spec(_INPUT, golden),),
        outputs=tuple(_spec(name, t) for name, t in zip(outputs, answers, strict=True)),
        environment=environment,
        files={name: fingerprint(folder / name) for name in names},
    )
    durable.replace(folder / MANIFEST, manifest.encode())
    try:
        rehearse(folder, manifest.digest)
    except Untrusted as error:
        raise TaskFailed(f"the finished bundle fails its own check: {error}") from error
    return manifest


def _load(module: torch.nn.Module, params: Params, example: Tensor) -> None:
    if example.dtype not in (torch.float32, torch.int64) or example.ndim < 1 or not len(example):
        raise ConfigError(
            f"example of {example.dtype} {tuple(example.shape)}: give rows of float32 or int64"
        )
    try:
        module.load_state_dict(dict(params), strict=True)
    except RuntimeError as error:
        raise ConfigError(f"parameters do not fit the module: {_line(error)}") from error
    module.eval()


def _write_golden(path: Path, inputs: Tensor, outputs: Mapping[str, Tensor]) -> None:
    arrays = {f"output:{name}": tensor.numpy() for name, tensor in outputs.items()}
    with io.BytesIO() as file:
        np.savez(file, allow_pickle=False, **{f"input:{_INPUT}": inputs.numpy(), **arrays})
        durable.replace(path, file.getvalue())


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, _DATATYPES[tensor.dtype], (-1, *tensor.shape[1:]))


def _answers(module: torch.nn.Module, rows: Tensor, outputs: Sequence[str]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        answer = module(rows)
    answers = (answer,) if isinstance(answer, Tensor) else tuple(answer)
    fits = len(answers) == len(outputs) and all(
        isinstance(t, Tensor) and t.ndim and len(t) == len(rows) and t.dtype in _DATATYPES
        for t in answers
    )
    if not fits:
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in answers]
        raise ConfigError(
            f"the module answers {shapes} to {len(rows)} rows; expected one tensor with "
            f"{len(rows)} rows for each of {list(outputs)}"
        )
    return answers


def _export(path: Path, module: torch.nn.Module, rows: Tensor, outputs: Sequence[str]) -> None:
    if len(rows) == 1:  # the exporter takes a batch of one for a constant
        rows = torch.cat([rows, rows])
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                (rows,),
                dynamo=True,
                opset_version=_OPSET,
                input_names=[_INPUT],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        if program is None:
            raise TaskFailed("ONNX export gave no program")
        model = program.model_proto
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise TaskFailed(f"ONNX export: {_line(error)}; serve a simpler module") from error
    for node in (*model.graph.node, *model.graph.input, *model.graph.output):
        node.ClearField("metadata_props")  # names of source files and of our folders
    durable.replace(path, model.SerializeToString())


def _check_export(
    path: Path, module: torch.nn.Module, golden: Tensor, outputs: Sequence[str]
) -> None:
    # other batch sizes too: a module that bakes its batch in passes on the golden one
    for rows in (golden, golden[:1], torch.cat([golden, golden])[: len(golden) + 1]):
        try:
            found = Session(path).run({_INPUT: rows.numpy()})
        except (Untrusted, TaskFailed) as error:
            raise TaskFailed(f"ONNX export of {len(rows)} rows: {error}") from error
        for name, answer in zip(outputs, _answers(module, rows, outputs), strict=True):
            if not agree(answer.numpy(), found[name]):
                raise TaskFailed(
                    f"ONNX answers {name} differently from torch for {len(rows)} rows; "
                    "a step of the module does not export"
                )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, warnings and advice off the terminal."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
