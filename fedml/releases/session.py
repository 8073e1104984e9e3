"""An ONNX model ready to answer, and the check that it answers as it did when it was made."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from fedml.errors import ConfigError, TaskFailed, Untrusted
from fedml.releases.manifest import GOLDEN, MODEL, TensorSpec, open_bundle

Array = npt.NDArray[np.generic]
Tensors = Mapping[str, Array]

TOLERANCE = 1e-4  # absolute and relative, on golden answers
_ERRORS: tuple[type[Exception], ...] = (
    _state.EPFail,
    _state.Fail,
    _state.InvalidArgument,
    _state.InvalidGraph,
    _state.InvalidProtobuf,
    _state.NoSuchFile,
    _state.NotImplemented,
    _state.RuntimeException,
    RuntimeError,
    ValueError,
)
_UNFIT: tuple[type[Exception], ...] = (*_ERRORS, KeyError, ConfigError)
_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    **{f"tensor({u}int{b})": f"{u}int{b}".upper() for u in ("", "u") for b in (8, 16, 32, 64)},
}


class Session:
    """A loaded model on the CPU. `run` may be called from any thread.

    `threads` is how many cores one call uses. Raises `Untrusted` if the file is no ONNX model
    that onnxruntime can serve.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4  # what goes wrong arrives as an exception
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
            self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
            self.outputs = tuple(_spec(value) for value in self._session.get_outputs())
        except _UNFIT as error:
            raise Untrusted(f"{path}: cannot be served: {_line(error)}") from error

    @property
    def has_rows(self) -> bool:
        """True if each input and output has one entry for each row, so that requests can share."""
        return all(spec.shape[:1] == (-1,) for spec in (*self.inputs, *self.outputs))

    def run(self, inputs: Tensors) -> dict[str, Array]:
        """Return the outputs by name; raises `TaskFailed` if the model cannot compute them."""
        try:
            found: list[Array] = self._session.run(None, dict(inputs))
        except _ERRORS as error:
            raise TaskFailed(f"the model failed: {_line(error)}") from error
        return {spec.name: array for spec, array in zip(self.outputs, found, strict=True)}


def rehearse(bundle: Path, digest: str = "", threads: int = 1) -> Session:
    """Load a bundle's model and put the golden questions to it; return it if it passes.

    Raises `Untrusted` if a file is not what the manifest names, the manifest not the one with
    `digest`, the model's signature not the manifest's, an answer off by more than `TOLERANCE`,
    or a row answered differently alone: then batching would mix strangers' requests.
    """
    manifest = open_bundle(bundle, digest)
    what = f"{manifest.model}/{manifest.version}"
    session = Session(bundle / MODEL, threads)
    if (session.inputs, session.outputs) != (manifest.inputs, manifest.outputs):
        raise Untrusted(f"{what}: the model's signature is not the one in its manifest")
    golden = read_golden(bundle / GOLDEN)
    try:
        inputs = {spec.name: golden[f"input:{spec.name}"] for spec in session.inputs}
        expected = {spec.name: golden[f"output:{spec.name}"] for spec in session.outputs}
        found = session.run(inputs)
        first = session.run(inputs if not session.has_rows else head(inputs, 1))
    except (KeyError, TaskFailed) as error:
        raise Untrusted(f"{what}: its golden inputs do not fit it ({error})") from error
    for name, array in expected.items():
        if not agree(array, found[name]):
            raise Untrusted(
                f"{what}: answers its golden inputs differently from when it was made (output "
                f"{name}); another onnxruntime, or a damaged model"
            )
        if session.has_rows and not agree(array[:1], first[name]):
            raise Untrusted(f"{what}: answers a row differently when it comes alone")
    return session


def head(inputs: Tensors, rows: int) -> dict[str, Array]:
    """Return `rows` rows of each input, repeating them from the start if there are fewer."""
    return {name: np.resize(array, (rows, *array.shape[1:])) for name, array in inputs.items()}


def agree(one: Array, other: Array) -> bool:
    """True if both have one shape and differ by no more than `TOLERANCE`; NaN never agrees."""
    return one.shape == other.shape and bool(
        np.allclose(one, other, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=False)
    )


def read_golden(path: Path) -> dict[str, Array]:
    """Return the arrays of an .npz file, without pickle; raises `Untrusted` if it has any."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise Untrusted(f"{path}: no plain .npz file: {_line(error)}") from error


def _spec(value: onnxruntime.NodeArg) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return TensorSpec(value.name, _DATATYPES[value.type], shape)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
