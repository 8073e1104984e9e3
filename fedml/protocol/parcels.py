"""Parcels: models and updates packed for the way, smaller, and the same to the bit once unpacked.

A file's header goes first, as it is, then its elements, window by window, by one of `FORMS`:

    bf16   of four-byte elements whose lower halves are all zero, the upper halves
    zstd   byte planes (all first bytes, all second ones, ...), each compressed by Zstandard
    delta  as zstd, of the differences to another file's elements, as integers modulo 2^bits

No form loses anything: what is lossy about "bf16" is `rounded`, which comes before and is a
value's affair. Who unpacks holds the result against its digest, so a parcel is never trusted.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
import zstandard
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from fedml.durable import failure
from fedml.errors import FedmlError, MalformedMessage
from fedml.params import MAX_HEADER, Params, spans
from fedml.protocol.messages import FORMS, Blob

P = TypeVar("P", bound=Params)
_Words = NDArray[np.unsignedinteger]

_WINDOW = 2**20  # bytes of a file that are packed together
_LEVEL = 1  # of Zstandard; measured: 3 takes longer and saves nothing on weights
_WHOLE, _HALVES = b"\0", b"\1"  # how a window of the form bf16 goes


def is_coarse(words: str) -> bool:
    """True if `words`, as in `Wire`, ask for rounding."""
    return "bf16" in words.split("+")


def form_of(words: str) -> str:
    """Return the form of parcels that `words`, as in `Wire`, ask for; "" for none that we know."""
    form = words.split("+")[-1]
    return form if form in FORMS else ""


def rounded(params: P) -> P:
    """Return `params` with each float32 rounded to the nearest bfloat16, ties to even.

    They stay float32. Values that are rounded already come back as they are, uncopied.
    """
    return params if _is_rounded(params) else params.map(_round)


def _round(buffer: Tensor) -> Tensor:
    return buffer.to(torch.bfloat16).to(torch.float32) if _is_float32(buffer) else buffer


def _is_rounded(params: Params) -> bool:
    if torch.float32 not in params.buffers:
        return True
    pieces = (piece for _, piece in params.windows(torch.float32))
    return all(not bool((piece.view(torch.int32) & 0xFFFF).any()) for piece in pieces)


def _is_float32(buffer: Tensor) -> bool:
    return buffer.dtype == torch.float32


# --- packing ------------------------------------------------------------------------------------


def pack(whole: Path, form: str, base: Path | None = None) -> Iterator[bytes]:
    """Yield the pieces of a parcel that stands for the file `whole`.

    A delta is the difference to `base`, which `fits`. Raises `OSError` as `open` does.
    """
    assert (form == "delta") == (base is not None), "a delta, and nothing else, has a base"
    squeezer = zstandard.ZstdCompressor(level=_LEVEL)
    with whole.open("rb") as file, (base or whole).open("rb") as other:
        head = _head(file)
        _head(other)
        yield len(head).to_bytes(4, "little") + head
        for width, size in _windows(head):
            words = _words(file.read(size), width)
            if form == "bf16":
                yield _halved(words)
                continue
            if base is not None:
                words = _difference(words, _words(other.read(size), width))
            yield from _squeezed(words, squeezer)


def fits(whole: Path, base: Path) -> bool:
    """True if `whole` can travel as the difference to `base`: the same tensors in both."""
    with whole.open("rb") as file, base.open("rb") as other:
        return _head(file) == _head(other)


def _head(file: BinaryIO) -> bytes:
    """Read a file's header, with its length before it."""
    size = file.read(8)
    long = int.from_bytes(size, "little")
    if len(size) < 8 or long > MAX_HEADER:
        raise MalformedMessage(f"a header of {long} bytes, limit {MAX_HEADER}")
    return size + _take(file, long)


def _windows(head: bytes) -> Iterator[tuple[int, int]]:
    """Yield how a body is cut: the bytes of an element, and of the window."""
    for width, size in spans(head[8:]):
        for start in range(0, size, _WINDOW):
            yield width, min(_WINDOW, size - start)


def _words(data: bytes, width: int) -> _Words:
    return np.frombuffer(data, dtype=f"<u{width}")


def _halved(words: _Words) -> bytes:
    if words.itemsize != 4 or (words & 0xFFFF).any():
        return _WHOLE + words.tobytes()
    return _HALVES + (words >> 16).astype("<u2").tobytes()


def _squeezed(words: _Words, squeezer: zstandard.ZstdCompressor) -> Iterator[bytes]:
    planes: NDArray[np.uint8] = words.view(np.uint8).reshape(-1, words.itemsize)
    for place in range(words.itemsize):
        data = squeezer.compress(np.ascontiguousarray(planes[:, place]).data)
        yield len(data).to_bytes(4, "little")
        yield data


def _difference(words: _Words, base: _Words) -> _Words:
    """Return the differences so that small ones, of either sign, have small first bytes."""
    one, top = words.dtype.type(1), words.dtype.type(8 * words.itemsize - 1)
    gap = words - base
    small: _Words = (gap << one) ^ (np.zeros_like(gap) - (gap >> top))
    return small


def _sum(gap: _Words, base: _Words) -> _Words:
    one = gap.dtype.type(1)
    return base + ((gap >> one) ^ (np.zeros_like(gap) - (gap & one)))


# --- unpacking ----------------------------------------------------------------------------------


def unpack(
    parcel: Path,
    form: str,
    blob: Blob,
    place: Path,
    base: Path | None = None,
    written: Callable[[], None] = lambda: None,
) -> None:
    """Write to `place` the file that a parcel stands for, which is `blob`, named by BLAKE3.

    Raises `MalformedMessage`, and leaves nothing, if it is anything else: never is more written
    than `blob` has bytes, and never more than a window of it in memory. Raises `NoRoom` on a full
    disk, `OSError` as `open` does. After each window `written` is called.
    """
    total = blake3()
    try:
        with place.open("wb") as out:
            for piece in _unpacked(parcel, form, blob.size, base):
                total.update(piece)
                out.write(piece)
                written()
        if total.hexdigest() != blob.digest:
            raise MalformedMessage(
                f"a parcel that is not the blob {blob.digest[:12]} it stands for"
            )
    except (OSError, FedmlError) as error:
        place.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise failure(str(place), error) from error
        raise


def _unpacked(parcel: Path, form: str, size: int, base: Path | None) -> Iterator[bytes]:
    if form not in FORMS:
        raise MalformedMessage(f"a parcel of form {form[:40]!r}, known are {FORMS}")
    if (form == "delta") != (base is not None):
        raise MalformedMessage(
            f"a parcel of form {form} {'without' if base is None else 'with'} a base"
        )
    with parcel.open("rb") as file, (base or parcel).open("rb") as other:
        long = int.from_bytes(_take(file, 4), "little")
        if not 8 <= long <= MAX_HEADER + 8:
            raise MalformedMessage(f"a parcel with a header of {long} bytes")
        head = _take(file, long)
        windows = _cut(head, size)
        if base is not None and _head(other) != head:
            raise MalformedMessage("a parcel that is the difference to a model of another shape")
        yield head
        squeezer = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        for width, many in windows:
            if form == "bf16":
                yield _doubled(file, width, many)
                continue
            words = _unsqueezed(file, width, many, squeezer)
            if base is not None:
                words = _sum(words, _words(_take(other, many), width))
            yield words.tobytes()
        if file.read(1):
            raise MalformedMessage("a parcel with more than its header says")


def _cut(head: bytes, size: int) -> Iterator[tuple[int, int]]:
    """Return the windows of a body, if with it the file has `size` bytes."""
    body = sum(many for _, many in spans(head[8:]))
    if int.from_bytes(head[:8], "little") != len(head) - 8 or len(head) + body != size:
        raise MalformedMessage(f"a parcel of {len(head)} + {body} bytes stands for one of {size}")
    return _windows(head)


def _doubled(file: BinaryIO, width: int, size: int) -> bytes:
    how = _take(file, 1)
    if how == _WHOLE:
        return _take(file, size)
    if how != _HALVES or width != 4:
        raise MalformedMessage(f"a parcel with a window of kind {how!r}, {width} bytes an element")
    return (_words(_take(file, size // 2), 2).astype("<u4") << 16).tobytes()


def _unsqueezed(
    file: BinaryIO, width: int, size: int, squeezer: zstandard.ZstdDecompressor
) -> _Words:
    count = size // width
    planes = np.empty((count, width), np.uint8)
    for place in range(width):
        long = int.from_bytes(_take(file, 4), "little")
        if long > count + count // 128 + 512:  # what cannot be compressed grows by less
            raise MalformedMessage(f"a parcel with {long} bytes for {count}")
        planes[:, place] = np.frombuffer(_plane(_take(file, long), count, squeezer), np.uint8)
    return planes.reshape(-1).view(f"<u{width}")


def _plane(data: bytes, count: int, squeezer: zstandard.ZstdDecompressor) -> bytes:
    """Return `count` bytes; what a frame says of itself is checked before room is made for it."""
    try:
        if (told := zstandard.frame_content_size(data)) != count:
            raise MalformedMessage(f"a parcel with a plane of {told} bytes, where {count} are due")
        plane = squeezer.decompress(data, max_output_size=count, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MalformedMessage(f"a parcel that does not decompress: {error}") from error
    if len(plane) != count:
        raise MalformedMessage(
            f"a parcel with a plane of {len(plane)} bytes, where {count} are due"
        )
    return plane


def _take(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise MalformedMessage(f"a parcel that ends {size - len(data)} bytes too soon")
    return data
