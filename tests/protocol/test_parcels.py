"""What is packed comes out the same to the bit, whatever the bits; rounding is torch's."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedml.params import Params, encode, read
from fedml.protocol.messages import FORMS, Blob
from fedml.protocol.parcels import fits, form_of, is_coarse, pack, rounded, unpack
from fedml.rounds.plan import Down, Up
from fedml.stacked import Stacked

DTYPES = [
    torch.float64, torch.int64, torch.float32, torch.int32, torch.float16, torch.bfloat16,
    torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip
ODD = [0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000,
       0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0x3F7FFFFF, 0x3F800000, 0x7F7FFFFF, 0x3F808000,
       0x3F818000, 0x00008000]  # fmt: skip
PLAN_WORDS = {*get_args(Down), *get_args(Up)}
words32 = st.one_of(st.sampled_from(ODD), st.integers(0, 2**32 - 1))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def floats(words: Sequence[int]) -> torch.Tensor:
    """Return float32 of these very bits."""
    return torch.from_numpy(np.array(words, dtype=np.uint32).view(np.float32))


def raw(tensor: torch.Tensor) -> NDArray[np.uint8]:
    bits: NDArray[np.uint8] = tensor.contiguous().view(torch.uint8).numpy()
    return bits


def write(folder: Path, name: str, parts: dict[str, Params]) -> tuple[Path, Blob]:
    data, path = b"".join(encode(parts)), folder / name
    path.write_bytes(data)
    return path, Blob(blake3(data).hexdigest(), len(data))


def there_and_back(folder: Path, form: str, parts: dict[str, Params], base: Path | None) -> int:
    """Pack and unpack, hold every bit of the file against what it was; return the parcel's size."""
    whole, blob = write(folder, "whole", parts)
    parcel = folder / "parcel"
    parcel.write_bytes(b"".join(pack(whole, form, base)))
    unpack(parcel, form, blob, folder / "back", base)
    assert (folder / "back").read_bytes() == whole.read_bytes()
    return parcel.stat().st_size


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Params], dict[str, Params]]:
    """Draw two files of the same tensors with any bits: NaN payloads, -0.0, subnormals."""
    fields = draw(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 9)), max_size=5))
    both: list[dict[str, dict[str, torch.Tensor]]] = [{}, {}]
    for number, (dtype, size) in enumerate(fields):
        part = draw(st.sampled_from(["", "c"]))
        for model in both:
            if dtype == torch.float32:
                tensor = floats(draw(st.lists(words32, min_size=size, max_size=size)))
            elif dtype == torch.bool:
                tensor = torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
                tensor = tensor.to(torch.bool)
            else:
                long = size * dtype.itemsize
                data = bytearray(draw(st.binary(min_size=long, max_size=long)))
                tensor = (
                    torch.frombuffer(data, dtype=dtype) if long else torch.empty(0, dtype=dtype)
                )
            model.setdefault(part, {})[f"t{number}"] = tensor
    return tuple({k: Params(v) for k, v in model.items()} for model in both)  # type: ignore[return-value]


@settings(max_examples=150, deadline=None)
@given(models(), st.sampled_from(FORMS))
def test_every_form_gives_back_every_bit(
    folder: Path, both: tuple[dict[str, Params], dict[str, Params]], form: str
) -> None:
    base, _ = write(folder, "base", both[1])
    there_and_back(folder, form, both[0], base if form == "delta" else None)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_of_many_windows_comes_back_and_those_that_are_alike_take_less(
    folder: Path, form: str
) -> None:
    """Windows of 1 MiB, the last one short; some can be halved and some cannot."""
    generator = torch.Generator().manual_seed(3)
    rough = torch.randn(700_001, generator=generator)
    rough[300_000:] = rounded(Params({"w": rough[300_000:]}))["w"]
    model = {
        "": Params({"w": rough, "n": torch.tensor(3), "tail": torch.ones(5, dtype=torch.int8)})
    }
    near = {"": model[""].map(lambda b: b + 1e-5 * b)}
    base, _ = write(folder, "base", near)
    size = there_and_back(folder, form, model, base if form == "delta" else None)
    assert size < model[""].layout.bytes


def test_a_rounded_model_takes_half_in_bf16_and_less_when_it_is_compressed(folder: Path) -> None:
    model = {"": rounded(Params({"w": torch.randn(400_000)}))}
    whole = model[""].layout.bytes
    halves = there_and_back(folder, "bf16", model, None)
    assert whole / 2 <= halves < whole / 2 + 1000
    assert there_and_back(folder, "zstd", model, None) < halves


def test_a_delta_to_the_same_model_is_next_to_nothing(folder: Path) -> None:
    model = {"": Params({"w": torch.randn(400_000)})}
    base, _ = write(folder, "base", model)
    assert there_and_back(folder, "delta", model, base) < 1000


def test_only_the_same_tensors_fit_a_delta(folder: Path) -> None:
    one, _ = write(folder, "one", {"": Params({"w": torch.ones(3)})})
    like, _ = write(folder, "like", {"": Params({"w": torch.zeros(3)})})
    other, _ = write(folder, "other", {"": Params({"v": torch.ones(3)})})
    assert fits(one, like)
    assert not fits(one, other)


# --- rounding -----------------------------------------------------------------------------------


def nearest_even(words: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Return the bits of the nearest bfloat16 by the definition, in whole numbers; no NaN."""
    low, kept = words & 0xFFFF, words >> 16
    up = (low > 0x8000) | ((low == 0x8000) & (kept & 1 == 1))
    nearest: NDArray[np.uint32] = (kept + up).astype(np.uint32) << 16
    return nearest


@settings(max_examples=200, deadline=None)
@given(st.lists(words32, min_size=1, max_size=40))
def test_rounding_is_to_the_nearest_bfloat16_ties_to_even_as_torch_does(words: list[int]) -> None:
    value = floats(words)
    ours = rounded(Params({"w": value}))["w"]
    assert (
        raw(ours) == raw(value.to(torch.bfloat16).to(torch.float32))
    ).all() or value.isnan().any()
    number = ~value.isnan()
    bits = np.array(words, dtype=np.uint32)[number.numpy()]
    assert (ours[number].numpy().view(np.uint32) == nearest_even(bits)).all()
    assert ours[~number].isnan().all()


@given(st.lists(words32, min_size=1, max_size=40))
def test_rounding_twice_is_rounding_once(words: list[int]) -> None:
    once = rounded(Params({"w": floats(words)}))
    twice = rounded(once)
    assert (raw(once["w"]) == raw(twice["w"])).all()
    assert twice is once  # and costs no memory


def test_rounding_leaves_whole_numbers_and_other_precisions_alone() -> None:
    third = 1 / 3
    params = Params(
        {
            "w": torch.full((2,), third),
            "wide": torch.full((2,), third, dtype=torch.float64),
            "half": torch.full((2,), third, dtype=torch.float16),
            "count": torch.tensor([2**30 + 1], dtype=torch.int32),
        }
    )
    after = rounded(params)
    assert after["w"].tolist() == [0.333984375] * 2
    for name in ("wide", "half", "count"):
        assert torch.equal(after[name], params[name])


def test_rounding_reads_a_mapped_file_and_a_stack_alike(folder: Path) -> None:
    rows = [Params({"w": torch.randn(300_000)}) for _ in range(2)]
    paths = [write(folder, f"row{n}", {"": row})[0] for n, row in enumerate(rows)]
    stack = rounded(Stacked(rows))
    for number, path in enumerate(paths):
        assert torch.equal(rounded(read(path)[""])["w"], stack.row(number)["w"])
        assert torch.equal(stack.row(number)["w"], rounded(rows[number])["w"])


def test_the_words_of_a_plan_say_what_is_rounded_and_in_which_form_it_goes() -> None:
    told = {words: (is_coarse(words), form_of(words)) for words in PLAN_WORDS}
    assert told == {
        "exact": (False, ""), "zstd": (False, "zstd"), "delta": (False, "delta"),
        "bf16": (True, "bf16"), "bf16+zstd": (True, "zstd"), "bf16+delta": (True, "delta"),
    }  # fmt: skip
    assert form_of("int4+gzip") == form_of("") == ""  # of a newer version: it goes whole


def test_pairs_of_odd_bits_survive_a_difference(folder: Path) -> None:
    pairs = list(itertools.product(ODD, ODD))
    base, _ = write(folder, "base", {"": Params({"w": floats([a for a, _ in pairs])})})
    there_and_back(folder, "delta", {"": Params({"w": floats([b for _, b in pairs])})}, base)
