"""Parameters are values over contiguous buffers, and their bytes are safetensors."""

import json
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedml.errors import ConfigError, MalformedMessage, MalformedUpdate
from fedml.params import Params, decode, encode, read


def model() -> Params:
    rng = torch.Generator().manual_seed(1)
    return Params(
        {
            "layer.weight": torch.randn(4, 3, generator=rng),
            "layer.bias": torch.randn(4, generator=rng),
            "scale": torch.randn((), generator=rng, dtype=torch.float64),
            "half": torch.randn(5, generator=rng).to(torch.bfloat16),
            "batches": torch.tensor(7),
            "mask": torch.tensor([True, False]),
            "empty": torch.zeros(0, 3),
        }
    )


def data_of(parts: dict[str, Params]) -> bytes:
    return b"".join(encode(parts))


def test_each_dtype_is_one_contiguous_buffer_with_named_views() -> None:
    params = model()
    floats = params.buffers[torch.float32]
    assert floats.shape == (4 * 3 + 4,)
    params["layer.bias"].view(-1)  # a view, so it shares the buffer's memory
    assert (
        params["layer.weight"].untyped_storage().data_ptr() == floats.untyped_storage().data_ptr()
    )


def test_the_order_of_names_given_makes_no_difference() -> None:
    params = model()
    turned = Params(dict(reversed(list(params.items()))))
    assert turned == params
    assert turned.digest() == params.digest()


def test_arithmetic_is_exact_and_leaves_integers_unscaled() -> None:
    params = model()
    double = params + params
    torch.testing.assert_close(double["layer.weight"], params["layer.weight"] * 2)
    assert double["batches"] == 14
    assert (params * 0.5)["batches"] == 7
    assert (double - params)["batches"] == 7
    assert not (params - params).to("cpu")["mask"].any()


def test_norm_spans_all_floats_in_float64() -> None:
    params = Params({"a": torch.tensor([3.0]), "b": torch.tensor([4.0], dtype=torch.float64)})
    assert params.norm() == 5.0
    assert math.isinf(Params({"a": torch.tensor([math.inf])}).norm())
    huge = Params({"a": torch.full((4,), 1e30)})  # its square overflows float32
    assert huge.norm() == pytest.approx(2e30)


def test_is_finite_sees_nan_and_infinity_anywhere() -> None:
    assert model().is_finite()
    assert not Params({"a": torch.tensor([0.0, math.nan])}).is_finite()
    assert not Params({"n": torch.tensor(1), "a": torch.tensor([-math.inf])}).is_finite()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"w": torch.zeros(3)}, "shape"),
        ({"v": torch.zeros(2)}, "names differ"),
        ({"w": torch.zeros(2, dtype=torch.float64)}, "dtype"),
        ({"w": torch.zeros(2), "v": torch.zeros(1)}, "names differ"),
    ],
)
def test_operands_must_agree(other: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(MalformedUpdate, match=message):
        Params({"w": torch.zeros(2)}) + Params(other)


def test_a_dtype_that_cannot_travel_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"w: dtype torch\.complex64"):
        Params({"w": torch.zeros(2, dtype=torch.complex64)})


def test_reading_back_shares_the_memory_of_the_bytes() -> None:
    params = model()
    data = bytearray(data_of({"": params, "control": params + params}))
    parts = decode(data)
    assert parts == {"": params, "control": params + params}
    place = data.rindex(params["layer.weight"].numpy().tobytes())
    data[place : place + 4] = torch.tensor([42.0]).numpy().tobytes()
    assert parts[""]["layer.weight"].reshape(-1)[0] == 42.0


def test_any_safetensors_reader_reads_ours_and_we_read_theirs() -> None:
    params = model()
    theirs = safetensors.torch.load(data_of({"": params}))
    assert Params(theirs) == params
    assert decode(safetensors.torch.save(dict(params)))[""] == params


def test_digest_is_of_the_values_and_their_names() -> None:
    params = model()
    assert params.digest() == decode(data_of({"": params}))[""].digest()
    assert params.digest() != (params + params).digest()
    renamed = Params({f"x.{name}": tensor for name, tensor in params.items()})
    assert params.digest() != renamed.digest()


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_as_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(data)


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=8), st.booleans())
def test_mutated_files_are_refused_or_read_as_other_values(
    place: int, noise: bytes, cut: bool
) -> None:
    data = bytearray(data_of({"": model()}))
    place %= len(data)
    data[place : place + len(noise)] = noise
    if cut:
        del data[place:]
    try:
        parts = decode(data)
    except MalformedMessage:
        return
    assert sum(p.layout.bytes for p in parts.values()) < len(data)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 17, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [1]},
        [],
    ],
)
def test_lying_headers_are_refused(entry: object) -> None:
    header = json.dumps({"w": entry}).encode()
    with pytest.raises(MalformedMessage):
        decode(len(header).to_bytes(8, "little") + header + bytes(4))


def test_a_file_is_read_as_it_was_encoded_and_outlives_its_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data_of({"": model(), "delta": model() * 2}))
    parts = read(path)
    path.unlink()
    assert parts == {"": model(), "delta": model() * 2}


def test_reading_a_file_that_is_empty_or_cut_is_malformed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    data = data_of({"": model()})
    for stump in (b"", data[:5], data[:-1]):
        path.write_bytes(stump)
        with pytest.raises(MalformedMessage):
            read(path)


def test_reading_a_file_that_is_not_there_is_the_callers_to_explain(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing")
