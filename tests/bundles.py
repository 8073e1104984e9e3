"""Small true bundles for tests: a linear model in ONNX, written without the exporter's seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from fedml import durable
from fedml.protocol.messages import RecipeId, RunId
from fedml.releases.manifest import (
    GOLDEN,
    MANIFEST,
    MODEL,
    WEIGHTS,
    Lineage,
    Manifest,
    TensorSpec,
    fingerprint,
)

WIDTH = 3


def facts(model: str = "heart", version: int = 1, created: float = 1000.0) -> Manifest:
    lineage = Lineage(
        run=RunId(f"run-{version}"),
        recipe=RecipeId("heart", "a" * 64),
        rounds=3,
        parent=version - 1,
        receipts=("b" * 64,),
        plan="c" * 64,
        code="d" * 64,
        data={"hospital-a": "e" * 64},
        epsilon={"hospital-a": 1.5},
        delta=1e-5,
    )
    return Manifest(
        model, version, created, lineage, labels=("well", "ill"), scores={"accuracy": 0.8}
    )


def write_bundle(
    folder: Path,
    model: str = "heart",
    version: int = 1,
    *,
    factor: float = 1.0,
    golden_error: float = 0.0,
    extra: Mapping[str, bytes] | None = None,
) -> Manifest:
    """A model that sums each row's `WIDTH` numbers, times `factor`."""
    weight = np.full((WIDTH, 1), factor, np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], ["output"])],
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(weight, "weight")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    rows = np.arange(4 * WIDTH, dtype=np.float32).reshape(4, WIDTH)
    folder.mkdir(parents=True, exist_ok=True)
    durable.replace(folder / MODEL, proto.SerializeToString())
    durable.replace(folder / WEIGHTS, weight.tobytes())
    with (folder / GOLDEN).open("wb") as file:
        answers = rows @ weight + golden_error
        np.savez(file, allow_pickle=False, **{"input:input": rows, "output:output": answers})
    names = [MODEL, WEIGHTS, GOLDEN]
    for name, data in (extra or {}).items():
        durable.replace(folder / name, data)
        names.append(name)
    manifest = Manifest(
        **{
            **vars(facts(model, version)),
            "inputs": (TensorSpec("input", "FP32", (-1, WIDTH)),),
            "outputs": (TensorSpec("output", "FP32", (-1, 1)),),
            "files": {name: fingerprint(folder / name) for name in names},
        }
    )
    durable.replace(folder / MANIFEST, manifest.encode())
    return manifest
