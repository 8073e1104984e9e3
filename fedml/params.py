"""Model parameters as values: named tensors over one contiguous buffer per dtype.

Norm, digest, addition and scaling are one pass over each buffer. The bytes of `encode` are a
safetensors file whose data section *is* those buffers, so reading copies nothing.

Integer buffers (a batch counter, say) travel with the model. They are added and subtracted
exactly, and never scaled or averaged into floats.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from mmap import ACCESS_READ, MADV_DONTNEED, mmap
from pathlib import Path
from typing import Self

import torch
from blake3 import blake3
from torch import Tensor

from fedml import pages
from fedml.errors import ConfigError, MalformedMessage, MalformedUpdate

_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}  # widest first, which keeps every buffer of a file aligned
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_CODES)}
MAX_HEADER = 16 * 2**20  # bytes; a header names tensors, it is never this long
_WINDOW = 2**20  # bytes of a mapped file that are in memory at a time
_BROAD = 2**23  # bytes from which on hashing is worth more than one thread, memory large pages


@dataclass(frozen=True)
class Layout:
    """Names, shapes and dtypes of a model, in canonical order: by dtype, then by name."""

    fields: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Layout:
        """Return the layout of `tensors`; raises `ConfigError` on a dtype that cannot travel."""
        fields = [(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
        for name, dtype, _ in fields:
            if dtype not in _CODES:
                raise ConfigError(f"{name}: dtype {dtype} cannot travel; use one of {[*_DTYPES]}")
            if ":" in name:
                raise ConfigError(f"{name}: a parameter name must not contain ':'")
        return Layout(tuple(sorted(fields, key=_canonical)))

    @cached_property
    def places(self) -> Mapping[str, tuple[torch.dtype, int, int, tuple[int, ...]]]:
        """Where each tensor lies: dtype, first element and end within that buffer, shape."""
        places, ends = {}, dict.fromkeys(self.sizes, 0)
        for name, dtype, shape in self.fields:
            start = ends[dtype]
            ends[dtype] = start + math.prod(shape)
            places[name] = (dtype, start, ends[dtype], shape)
        return places

    @cached_property
    def sizes(self) -> Mapping[torch.dtype, int]:
        """Elements in each buffer, buffers in canonical order."""
        sizes: dict[torch.dtype, int] = {}
        for _, dtype, shape in self.fields:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shape)
        return sizes

    @property
    def bytes(self) -> int:
        """Bytes of all the buffers together."""
        return sum(dtype.itemsize * size for dtype, size in self.sizes.items())

    def check_like(self, other: Layout) -> None:
        """Raise `MalformedUpdate` unless `other` has the same names, shapes and dtypes."""
        if self == other:
            return
        mine, theirs = self.places, other.places
        if mine.keys() != theirs.keys():
            raise MalformedUpdate(f"names differ: {sorted(mine.keys() ^ theirs.keys())[:5]}")
        for name, (dtype, _, _, shape) in mine.items():
            if theirs[name][3] != shape:
                raise MalformedUpdate(f"{name}: shape {theirs[name][3]}, expected {shape}")
            if theirs[name][0] != dtype:
                raise MalformedUpdate(f"{name}: dtype {theirs[name][0]}, expected {dtype}")


def _canonical(field: tuple[str, torch.dtype, tuple[int, ...]]) -> tuple[int, str]:
    return _RANK[field[1]], field[0]


class Params(Mapping[str, Tensor]):
    """An immutable mapping from parameter name to a view into its dtype's buffer.

    Arithmetic returns new objects. Both operands must have the same names, shapes and dtypes,
    else `MalformedUpdate` is raised; broadcasting never happens. Treat the views as read-only.

    Those that `read` maps from a file take no memory to speak of: what goes over all values goes
    window by window, and lets each go.
    """

    __slots__ = ("_file", "_views", "buffers", "known", "layout")

    layout: Layout
    buffers: Mapping[torch.dtype, Tensor]
    known: dict[str, float | str]  # what was found out about the values, for they do not change

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        layout = Layout.of(tensors)
        buffers = {}
        for dtype in layout.sizes:
            parts = [tensors[n].detach().reshape(-1) for n, d, _ in layout.fields if d == dtype]
            buffers[dtype] = torch.cat(parts)
        self._set(layout, buffers)

    @classmethod
    def over(cls, layout: Layout, buffers: Mapping[torch.dtype, Tensor]) -> Self:
        """Wrap `buffers` without a copy; each is 1-D and as long as `layout.sizes` says."""
        found = {dtype: buffer.shape for dtype, buffer in buffers.items()}
        if found != {dtype: torch.Size([size]) for dtype, size in layout.sizes.items()}:
            raise MalformedUpdate(f"buffers {found} do not fit the layout's {dict(layout.sizes)}")
        params = cls.__new__(cls)
        params._set(layout, buffers)
        return params

    def _set(self, layout: Layout, buffers: Mapping[torch.dtype, Tensor]) -> None:
        self.layout, self.buffers = layout, dict(buffers)
        self._views: dict[str, Tensor] = {}
        self._file: mmap | None = None
        self.known = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._views:
            dtype, start, end, shape = self.layout.places[name]
            self._views[name] = self.buffers[dtype][start:end].view(shape)
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.places)

    def __len__(self) -> int:
        return len(self.layout.fields)

    def __repr__(self) -> str:
        return f"Params({len(self)} tensors, {self.layout.bytes} bytes)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Params):
            return NotImplemented
        return self.layout == other.layout and all(
            torch.equal(buffer, other.buffers[dtype]) for dtype, buffer in self.buffers.items()
        )

    def __hash__(self) -> int:
        return hash(self.layout)

    def __add__(self, other: Params) -> Self:
        return self._combine(other, torch.add)

    def __sub__(self, other: Params) -> Self:
        return self._combine(other, torch.sub)

    def __mul__(self, factor: float) -> Self:
        if factor == 1:
            return self
        return self.map(lambda buffer: buffer * factor)

    def _combine(self, other: Params, fn: Callable[[Tensor, Tensor], Tensor]) -> Self:
        self.check_like(other)
        fns = {torch.bool: torch.logical_xor}  # torch has no subtraction of booleans
        return self.over(
            self.layout, {d: _each(fns.get(d, fn), d, self, other) for d in self.buffers}
        )

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """Apply an elementwise `fn` to each floating buffer; integers stay as they are."""
        return self.over(
            self.layout,
            {d: _each(fn, d, self) if d.is_floating_point else b for d, b in self.buffers.items()},
        )

    def zip(self, other: Params, fn: Callable[[Tensor, Tensor], Tensor]) -> Self:
        """Apply an elementwise `fn` to each pair of floating buffers; keep our own integers."""
        self.check_like(other)
        return self.over(
            self.layout,
            {
                d: _each(fn, d, self, other) if d.is_floating_point else b
                for d, b in self.buffers.items()
            },
        )

    def zeros(self) -> Self:
        """Zeros of the same layout and devices."""
        return self.over(self.layout, {d: torch.zeros_like(b) for d, b in self.buffers.items()})

    def clone(self) -> Self:
        """Return the same values in memory of their own."""
        return self.over(self.layout, {d: b.clone() for d, b in self.buffers.items()})

    def norm(self) -> float:
        """L2 norm over all floating tensors together, accumulated in float64."""
        squares = (
            float(torch.linalg.vector_norm(b, dtype=torch.float64)) ** 2
            for d, b in self.buffers.items()
            if d.is_floating_point
        )
        return math.sqrt(math.fsum(squares))

    def peak(self) -> float:
        """Return the largest magnitude of a floating element: NaN if one is NaN, 0 without any.

        The values are looked at once, at the first call: they must not change afterwards.
        """
        known = self.known.get("peak")
        if not isinstance(known, float):
            floats = (d for d, b in self.buffers.items() if d.is_floating_point and b.numel())
            pieces = (piece for dtype in floats for _, piece in self.windows(dtype))
            ends = [float(end) for piece in pieces for end in piece.aminmax()]  # NaN spreads
            known = math.nan if any(map(math.isnan, ends)) else max(map(abs, ends), default=0.0)
            self.known["peak"] = known
        return known

    def is_finite(self) -> bool:
        """True if no floating element is NaN or infinite; looks as `peak` does, once."""
        return math.isfinite(self.peak())

    def to(self, device: torch.device | str) -> Self:
        """Return the same values on `device`; no copy where they are there already."""
        moved = {d: b.to(device) for d, b in self.buffers.items()}
        if all(b is self.buffers[d] for d, b in moved.items()):
            return self
        return self.over(self.layout, moved)

    def windows(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Yield one buffer's elements in order, with the first one's place: a mapped file's
        window by window, each let go when the next is asked for, else all at once.
        """
        buffer = self.buffers[dtype]
        if self._file is None:
            yield 0, buffer
            return
        step = _WINDOW // dtype.itemsize
        for start in range(0, len(buffer), step):
            yield start, buffer[start : start + step]
            self.let_go()

    @property
    def is_mapped(self) -> bool:
        """True if the values lie in a file that `read` mapped."""
        return self._file is not None

    def let_go(self) -> None:
        """Give back the memory of what was looked at of a mapped file; a later look reads again."""
        if self._file is not None:
            self._file.madvise(MADV_DONTNEED)

    def digest(self) -> str:
        """BLAKE3 of `encode()`, in hex: equal parameters have equal digests."""
        digest = self.known.get("digest")
        if not isinstance(digest, str):
            total = blake3(max_threads=blake3.AUTO if self.layout.bytes >= _BROAD else 1)
            for piece in pieces({"": self}):
                total.update(piece)
            digest = self.known["digest"] = total.hexdigest()
        return digest

    def check_like(self, other: Params) -> None:
        """Raise `MalformedUpdate` unless `other` has the same names, shapes and dtypes."""
        self.layout.check_like(other.layout)


def encode(parts: Mapping[str, Params]) -> list[memoryview]:
    """Return the pieces of one safetensors file that holds `parts`, buffers uncopied.

    A part called `delta` stores its tensor `w` as `delta:w`; the part called "" stores plain
    names, as any safetensors reader expects of a model.
    """
    header, pieces, end = {}, [], 0
    for dtype, part in order(parts):
        params = parts[part]
        for name, place, shape in params.layout.fields:
            if place == dtype:
                start, end = end, end + math.prod(shape) * dtype.itemsize
                key = f"{part}:{name}" if part else name
                header[key] = _entry(dtype, shape, start, end)
        buffer = params.buffers[dtype].detach().cpu().contiguous()
        pieces.append(buffer.view(torch.uint8).numpy().data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [memoryview(len(text).to_bytes(8, "little") + text), *pieces]


def pieces(parts: Mapping[str, Params]) -> Iterator[memoryview]:
    """Yield what `encode` returns in pieces of a few MB, to be used before the next is asked for.

    Mapped files are let go piece by piece, so they take no memory to speak of.
    """
    for whole in encode(parts):
        for start in range(0, len(whole), _WINDOW):
            yield whole[start : start + _WINDOW]
            for params in parts.values():
                params.let_go()


def order(parts: Mapping[str, Params]) -> list[tuple[torch.dtype, str]]:
    """Return the buffers of `parts`, by dtype and part, as they follow each other in a file."""
    return sorted(
        ((dtype, part) for part, params in parts.items() for dtype in params.buffers),
        key=lambda item: (_RANK[item[0]], item[1]),
    )


def _entry(dtype: torch.dtype, shape: tuple[int, ...], start: int, end: int) -> dict[str, object]:
    return {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}


_Entry = tuple[torch.dtype, tuple[int, ...], int, int]  # dtype, shape, first byte, end
_Entries = dict[str, _Entry]


def decode(data: bytes | bytearray | memoryview | mmap) -> dict[str, Params]:
    """Return the parts of a safetensors file; raises `MalformedMessage` on anything odd.

    Files in our own order become views into `data`; others, valid but foreign, are copied.
    """
    view = memoryview(data)
    if len(view) < 8:
        raise MalformedMessage(f"{len(view)} bytes are no safetensors file")
    size = int.from_bytes(view[:8], "little")
    if size > min(MAX_HEADER, len(view) - 8):
        raise MalformedMessage(f"a header of {size} bytes in a file of {len(view)}")
    header, body = _parse_header(bytes(view[8 : 8 + size])), view[8 + size :]
    if (end := _end(header)) != len(body):
        raise MalformedMessage(f"tensors take {end} bytes, the file has {len(body)}")
    parts: dict[str, _Entries] = {}
    for key, entry in header.items():
        part, _, name = key.rpartition(":")
        parts.setdefault(part, {})[name] = entry
    return {part: _gather(entries, body) for part, entries in parts.items()}


def spans(header: bytes) -> list[tuple[int, int]]:
    """Return what lies side by side in a file with that header: bytes of an element, and of all.

    Raises `MalformedMessage` on anything odd.
    """
    entries, found = _parse_header(header), list[tuple[int, int]]()
    _end(entries)
    for dtype, _, start, stop in entries.values():
        before = found.pop()[1] if found and found[-1][0] == dtype.itemsize else 0
        found.append((dtype.itemsize, before + stop - start))
    return found


def read(path: Path) -> dict[str, Params]:
    """Return the parts of a safetensors file, mapped and not copied; raises `MalformedMessage`.

    Only what is looked at comes into memory, and may leave it again. The file may be deleted or
    replaced meanwhile, but must never be written to or cut. Raises `OSError` as `open` does.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return decode(b"")
        data = mmap(file.fileno(), size, access=ACCESS_READ)
    parts = decode(data)
    for params in parts.values():
        params._file = data
        params.let_go()  # the header
    return parts


def _parse_header(text: bytes) -> _Entries:
    try:
        raw = json.loads(text)
        raw.pop("__metadata__", None)
        entries = {str(name): _parse_entry(str(name), entry) for name, entry in raw.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MalformedMessage(f"safetensors header: {type(error).__name__}: {error}") from error
    return dict(sorted(entries.items(), key=lambda item: (item[1][2], item[1][3])))


def _end(entries: _Entries) -> int:
    """Return how many bytes the tensors take, if they lie side by side."""
    end = 0
    for name, (_, _, start, stop) in entries.items():
        if start != end:
            raise MalformedMessage(f"{name}: tensors overlap or leave a gap at byte {end}")
        end = stop
    return end


def _parse_entry(name: str, entry: Mapping[str, list[int]]) -> _Entry:
    dtype, shape = _DTYPES[str(entry["dtype"])], tuple(entry["shape"])
    start, end = entry["data_offsets"]
    if not all(type(n) is int and 0 <= n < 2**40 for n in (*shape, start, end)) or len(shape) > 16:
        raise ValueError(f"{name}: shape {shape} at {start}-{end}")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {end - start} bytes for shape {shape} of {dtype}")
    return dtype, shape, start, end


def _gather(entries: _Entries, body: memoryview) -> Params:
    fields = ((name, dtype, shape) for name, (dtype, shape, _, _) in entries.items())
    layout = Layout(tuple(sorted(fields, key=_canonical)))
    buffers: dict[torch.dtype, Tensor] = {}
    for dtype, size in layout.sizes.items():
        spans = [entries[n][2:] for n, d, _ in layout.fields if d == dtype]
        solid = all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        aligned = spans[0][0] % dtype.itemsize == 0
        if size == 0:
            buffers[dtype] = torch.empty(0, dtype=dtype)
        elif solid and aligned:
            buffers[dtype] = _view(body[spans[0][0] : spans[-1][1]], dtype)
        else:
            joined = bytearray().join(body[start:end] for start, end in spans)
            buffers[dtype] = _view(memoryview(joined), dtype)
    return Params.over(layout, buffers)


def _each(fn: Callable[..., Tensor], dtype: torch.dtype, *operands: Params) -> Tensor:
    """Apply an elementwise `fn` to the operands' buffers of one dtype, mapped ones by windows."""
    mapped = [params for params in operands if params._file is not None]
    buffers = [params.buffers[dtype] for params in operands]
    if not mapped:
        return fn(*buffers)
    whole, step = torch.empty(0), _WINDOW // dtype.itemsize
    for start in range(0, len(buffers[0]), step):
        piece = fn(*(buffer[start : start + step] for buffer in buffers))
        if start == 0:
            whole = _room(len(buffers[0]), piece.dtype)
        whole[start : start + step] = piece
        for params in mapped:
            params.let_go()
    return whole if len(buffers[0]) else fn(*buffers)


def _room(numbers: int, dtype: torch.dtype) -> Tensor:
    size = numbers * dtype.itemsize
    if size < _BROAD:
        return torch.empty(numbers, dtype=dtype)
    return torch.frombuffer(pages.large(size), dtype=dtype)


def _view(data: memoryview, dtype: torch.dtype) -> Tensor:
    with warnings.catch_warnings():  # read-only memory is what we want: Params are values
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(data, dtype=dtype)
