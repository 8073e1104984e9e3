"""Parcels made by someone who means harm: refused in one line, with little written or held."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zstandard
from blake3 import blake3

from fedml.errors import MalformedMessage
from fedml.params import Params, encode
from fedml.protocol.messages import FORMS, Blob
from fedml.protocol.parcels import pack, unpack

MUCH = 2**30  # bytes, as a bomb would have them
MODEL = {"": Params({"w": torch.randn(40, generator=torch.Generator().manual_seed(1))})}


def header(body: int) -> bytes:
    """Return a header, with its length before it, of a file with one tensor of `body` bytes."""
    text = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (body, body)
    return len(text).to_bytes(8, "little") + text


def counted(data: bytes) -> bytes:
    """Return `data` with its length before it, as headers and planes go."""
    return len(data).to_bytes(4, "little") + data


def refused(folder: Path, parcel: bytes, form: str, blob: Blob, base: Path | None = None) -> str:
    """Return the one line with which a parcel is refused; nothing is left of it."""
    path, place = folder / "parcel", folder / "place"
    path.write_bytes(parcel)
    with pytest.raises(MalformedMessage) as caught:
        unpack(path, form, blob, place, base)
    assert not place.exists()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 300
    return line


def honest(folder: Path, form: str) -> tuple[bytes, Blob, Path | None]:
    """Return a good parcel, what it stands for, and its base."""
    data = b"".join(encode(MODEL))
    whole, base = folder / "whole", folder / "base"
    whole.write_bytes(data)
    base.write_bytes(b"".join(encode({"": MODEL[""] * 1.01})))
    other = base if form == "delta" else None
    return b"".join(pack(whole, form, other)), Blob(blake3(data).hexdigest(), len(data)), other


def endless(long: int) -> bytes:
    """Return a frame of zeros that does not say how long it is."""
    squeezer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return squeezer.compress(bytes(long)) + squeezer.flush()


def boasting(long: int) -> bytes:
    """Return a frame that says it holds `long` bytes, and holds few."""
    frame = bytearray(zstandard.ZstdCompressor().compress(bytes(2**16 + 300)))
    at = frame.index((2**16 + 300).to_bytes(4, "little"))
    frame[at : at + 4] = long.to_bytes(4, "little")
    return bytes(frame)


@pytest.mark.parametrize(
    "frame",
    [
        lambda: zstandard.ZstdCompressor().compress(bytes(MUCH)),
        lambda: endless(MUCH),
        lambda: boasting(MUCH),
        lambda: zstandard.ZstdCompressor().compress(bytes(100)) + endless(MUCH),
    ],
    ids=["a thousandth of it", "of no told length", "that lies", "behind an honest frame"],
)
def test_decompression_bomb(tmp_path: Path, frame: Callable[[], bytes]) -> None:
    """A plane of 100 bytes is due; no more room than that is made for what claims to be one."""
    head = header(100)
    blob = Blob("00" * 32, len(head) + 100)
    parcel = counted(head) + counted(frame())
    tracemalloc.start()
    line = refused(tmp_path, parcel, "zstd", blob)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(parcel) + 2**20, line


def test_a_parcel_that_stands_for_more_than_was_agreed(tmp_path: Path) -> None:
    """A gigabyte of zeros is a few KB on the way; what was agreed on has 1000 bytes."""
    head = header(MUCH)
    plane = zstandard.ZstdCompressor().compress(bytes(2**20))
    line = refused(tmp_path, counted(head) + counted(plane) * 1024, "zstd", Blob("00" * 32, 1000))
    assert line == f"a parcel of {len(head)} + {MUCH} bytes stands for one of 1000"


def test_a_header_bomb(tmp_path: Path) -> None:
    for long in (2**32 - 1, 17 * 2**20, 7, 0):
        line = refused(tmp_path, long.to_bytes(4, "little"), "zstd", Blob("00" * 32, 1000))
        assert line == f"a parcel with a header of {long} bytes"


@pytest.mark.parametrize("form", FORMS)
def test_a_parcel_cut_off_at_any_byte(tmp_path: Path, form: str) -> None:
    parcel, blob, base = honest(tmp_path, form)
    for end in range(len(parcel)):
        refused(tmp_path, parcel[:end], form, blob, base)


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_bit_anywhere_is_refused_or_changes_nothing(tmp_path: Path, form: str) -> None:
    """Some bits of a compressed frame mean nothing; whatever comes out is what was agreed on."""
    parcel, blob, base = honest(tmp_path, form)
    path, place, changed = tmp_path / "parcel", tmp_path / "place", 0
    for bit in range(8 * len(parcel)):
        bad = bytearray(parcel)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            unpack(path, form, blob, place, base)
        except MalformedMessage as error:
            changed += 1
            assert not place.exists()
            assert "\n" not in str(error)
        else:
            assert place.read_bytes() == (tmp_path / "whole").read_bytes()
    assert changed > 7 * len(parcel)


@pytest.mark.parametrize("form", FORMS)
def test_another_model_in_the_place_of_the_agreed_one(tmp_path: Path, form: str) -> None:
    parcel, blob, base = honest(tmp_path, form)
    line = refused(tmp_path, parcel, form, Blob("ab" * 32, blob.size), base)
    assert line == "a parcel that is not the blob abababababab it stands for"


def test_bytes_hidden_behind_a_parcel(tmp_path: Path) -> None:
    for form in FORMS:
        parcel, blob, base = honest(tmp_path, form)
        line = refused(tmp_path, parcel + b"x", form, blob, base)
        assert line == "a parcel with more than its header says"


def test_a_delta_to_a_model_that_changed_since(tmp_path: Path) -> None:
    """A site's disk lies, or a coordinator does: what comes out is not the agreed model."""
    parcel, blob, base = honest(tmp_path, "delta")
    assert base is not None
    base.write_bytes(b"".join(encode({"": MODEL[""] * 1.02})))
    assert "not the blob" in refused(tmp_path, parcel, "delta", blob, base)
    base.write_bytes(b"".join(encode({"": Params({"v": torch.ones(40)})})))
    assert "of another shape" in refused(tmp_path, parcel, "delta", blob, base)
    base.write_bytes(b"")
    refused(tmp_path, parcel, "delta", blob, base)


def test_a_form_that_is_none(tmp_path: Path) -> None:
    parcel, blob, _ = honest(tmp_path, "zstd")
    assert "'pickle'" in refused(tmp_path, parcel, "pickle", blob)
    assert "without a base" in refused(tmp_path, parcel, "delta", blob)
