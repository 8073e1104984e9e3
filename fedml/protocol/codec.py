"""Messages to bytes and back, and every limit on what the wire may carry.

A dataclass and the protobuf message of the same name have the same fields, so one walk over type
hints serves them all: a new message is a dataclass and an entry in fedml.proto, and no code. Both
ends check the same limits, so a sender hears of a bad value before a receiver does. Whatever does
not fit, foreign bytes or a value of our own, raises `MalformedMessage` and nothing else.
"""

from __future__ import annotations

import collections.abc
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, partial
from types import UnionType
from typing import Literal, NewType, TypeVar, cast, get_args, get_origin, get_type_hints

from google.protobuf.message import DecodeError, EncodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from fedml.errors import ConfigError, MalformedMessage
from fedml.protocol import operations, requests
from fedml.protocol._generated import fedml_pb2
from fedml.protocol.messages import Command, SiteEvent, check_id

T = TypeVar("T")

PROTOCOL: str = fedml_pb2.DESCRIPTOR.package  # its number is the major version, see docs/faults.md
MAX_MESSAGE = 4 * 2**20  # bytes of one encoded message
MAX_CHUNK = 2**20  # bytes of one piece of a blob; measured: smaller and larger are slower
MAX_TEXT = 64 * 2**10  # bytes of a string
MAX_DOCUMENT = 2 * 2**20  # bytes of a plan or a manifest
MAX_ENTRIES = 10_000  # of a map; receipts have one entry for each site that did not count
MAX_ITEMS = 10_000  # of a list
_DOCUMENTS = frozenset({"plan", "manifest", "result"})


def encode(message: object) -> bytes:
    """Return a dataclass as bytes; one of a union is encoded as itself, without the union."""
    if isinstance(message, requests.Chunk):
        return message.frame if isinstance(message, Framed) else _frame(b"", message.data)
    return _serialize(_put_message(message, type(message).__name__))


def decode(kind: type[T], data: bytes) -> T:
    """Return the dataclass `kind` that `data` holds."""
    if kind is requests.Chunk and (chunk := _unframe(data, 0)):
        return cast(T, chunk)
    return _take_message(kind, _parse(kind.__name__, data), kind.__name__)


def encode_command(command: Command) -> bytes:
    """Return one of the `Command`s as bytes."""
    return _encode_one("Command", Command, command)


def decode_command(data: bytes) -> Command | None:
    """Return the `Command` that `data` holds; None for a kind that only newer versions know."""
    return _decode_one("Command", Command, data)  # type: ignore[return-value]


def encode_event(event: SiteEvent) -> bytes:
    """Return one of the `SiteEvent`s as bytes."""
    return _encode_one("SiteEvent", SiteEvent, event)


def decode_event(data: bytes) -> SiteEvent | None:
    """Return the `SiteEvent` that `data` holds; None for a kind that only newer versions know."""
    return _decode_one("SiteEvent", SiteEvent, data)  # type: ignore[return-value]


def encode_part(part: requests.UploadPart) -> bytes:
    """Return one of the `UploadPart`s as bytes."""
    if isinstance(part, requests.Chunk):
        return _frame(_PART, part.data)
    return _encode_one("UploadPart", requests.UploadPart, part)


def decode_part(data: bytes) -> requests.UploadPart:
    """Return the `UploadPart` that `data` holds."""
    if data[:1] == _PART:
        size, start = _varint_at(data, 1)
        if size == len(data) - start and (chunk := _unframe(data, start)):
            return chunk
    part = _decode_one("UploadPart", requests.UploadPart, data)
    if part is None:
        raise MalformedMessage("a part of an upload that this version does not know")
    return part  # type: ignore[return-value]


# --- chunks, by hand: protobuf would copy each MiB twice either way -----------------------------

_DATA = b"\x0a"  # field 1 of Chunk, some bytes
_PART = b"\x12"  # field 2 of UploadPart, a Chunk


@dataclass(frozen=True)
class Framed(requests.Chunk):
    """A chunk that is written out once, however often it is sent; `data` is a view of `frame`."""

    frame: bytes


def framed(data: bytes | memoryview) -> Framed:
    """Return a chunk as `encode` would write it, with a copy of its own of `data`."""
    frame = _frame(b"", data)
    return Framed(memoryview(frame)[len(frame) - len(data) :], frame)


def _frame(part: bytes, data: bytes | memoryview) -> bytes:
    """Return a chunk as protobuf would write it, within the field `part` of another message."""
    if len(data) > MAX_CHUNK:
        raise MalformedMessage(f"Chunk.data: {len(data)} bytes, limit {MAX_CHUNK}")
    head = _DATA + _varint(len(data)) if data else b""
    if part:
        head = part + _varint(len(head) + len(data)) + head
    return b"".join((head, data))


def _unframe(data: bytes, start: int) -> requests.Chunk | None:
    """Return the chunk that starts there, a view, if it is written as we write them."""
    if data[start : start + 1] != _DATA:
        return None
    size, start = _varint_at(data, start + 1)
    if size != len(data) - start or size > MAX_CHUNK:
        return None
    return requests.Chunk(memoryview(data)[start:])


def _varint(number: int) -> bytes:
    digits = bytearray()
    while number > 0x7F:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def _varint_at(data: bytes, start: int) -> tuple[int, int]:
    """Return a number, and where it ends; -1 if it is none that a length would be."""
    number = 0
    for place, digit in enumerate(data[start : start + 5]):
        number |= (digit & 0x7F) << 7 * place
        if digit < 0x80:
            return number, start + place + 1
    return -1, start


# --- whole messages ---------------------------------------------------------------------------


def _serialize(message: Message) -> bytes:
    try:
        data = message.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise MalformedMessage(f"{message.DESCRIPTOR.name}: {error}") from error
    if len(data) > MAX_MESSAGE:
        raise MalformedMessage(f"{message.DESCRIPTOR.name}: {len(data)} bytes, limit {MAX_MESSAGE}")
    return data


def _parse(name: str, data: bytes) -> Message:
    if len(data) > MAX_MESSAGE:
        raise MalformedMessage(f"{name}: {len(data)} bytes, limit {MAX_MESSAGE}")
    message = _foreign(name)()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise MalformedMessage(f"{name}: {len(data)} bytes do not decode") from error
    return message


def _foreign(name: str) -> type[Message]:
    kind: type[Message] = getattr(fedml_pb2, name)
    return kind


def _put_message(value: object, where: str) -> Message:
    values = {
        name: shape.put(getattr(value, name), f"{where}.{name}")
        for name, shape in _shapes(type(value)).items()
    }
    try:
        return _foreign(type(value).__name__)(**values)
    except (TypeError, ValueError) as error:  # ValueError: text that is not Unicode
        raise MalformedMessage(f"{where}: {error}") from error


def _take_message(kind: type[T], message: Message, where: str) -> T:
    values = {}
    for name, shape in _shapes(kind).items():
        if shape.present and not message.HasField(name):
            raise MalformedMessage(f"{where}.{name} is missing")
        values[name] = shape.take(getattr(message, name), f"{where}.{name}")
    try:
        return kind(**values)
    except ConfigError as error:
        raise MalformedMessage(f"{where}: {error}") from error


def _encode_one(name: str, union: UnionType, value: object) -> bytes:
    for label, kind in _members(union).items():
        if kind is type(value):
            return _serialize(_foreign(name)(**{label: _put_message(value, kind.__name__)}))
    raise MalformedMessage(f"{type(value).__name__} is no {name}")


def _decode_one(name: str, union: UnionType, data: bytes) -> object:
    message = _parse(name, data)
    label = message.WhichOneof("one")
    if label is None:
        if len(UnknownFieldSet(message)):
            return None
        raise MalformedMessage(f"a {name} that holds nothing")
    kind = _members(union)[label]
    return _take_message(kind, getattr(message, label), kind.__name__)


@cache
def _members(union: UnionType) -> Mapping[str, type[object]]:
    return {_snake(kind.__name__): kind for kind in get_args(union)}


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()


# --- fields -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """How a field is checked and turned, either way; `present` if its absence can be seen."""

    put: Callable[[object, str], object]
    take: Callable[[object, str], object]
    present: bool = False


_known: dict[type[object], Mapping[str, _Shape]] = {}


def _shapes(kind: type[object]) -> Mapping[str, _Shape]:
    if kind not in _known:
        assert is_dataclass(kind)
        hints = get_type_hints(kind)
        # Answers are for people to read: a score may be NaN there, and a run's id empty.
        strict = kind.__module__ != operations.__name__
        _known[kind] = {f.name: _shape(hints[f.name], f.name, strict) for f in fields(kind)}
    return _known[kind]


def _shape(hint: object, name: str, strict: bool) -> _Shape:
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        item = _shape(args[0], name, strict)
        return _Shape(partial(_list, item.put), partial(_list, item.take))
    if origin is collections.abc.Mapping:
        item = _shape(args[1], name, strict)
        return _Shape(partial(_map, item.put), partial(_map, item.take))
    if isinstance(hint, type) and is_dataclass(hint):
        return _Shape(_put_message, partial(_nested, hint), present=True)
    check = _scalar(hint, name, strict)
    return _Shape(check, check)


def _scalar(hint: object, name: str, strict: bool) -> Callable[[object, str], object]:
    if get_origin(hint) is Literal:
        return partial(_word, get_args(hint))
    if isinstance(hint, NewType):
        return _id if strict else partial(_text, MAX_TEXT)
    if hint == bytes | memoryview:
        return _bytes
    if hint is str:
        return partial(_text, MAX_DOCUMENT if name in _DOCUMENTS else MAX_TEXT)
    if hint is float:
        return _finite if strict else _number
    plain = {int: _integer, bool: _flag, bytes: _bytes}
    assert isinstance(hint, type), f"{name}: {hint} has no place on the wire"
    return plain[hint]


def _nested(kind: type[object], value: object, where: str) -> object:
    assert isinstance(value, Message)
    return _take_message(kind, value, where)


def _list(each: Callable[[object, str], object], value: object, where: str) -> tuple[object, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str | bytes):
        raise MalformedMessage(f"{where}: {type(value).__name__} is no list")
    items = tuple(value)
    if len(items) > MAX_ITEMS:
        raise MalformedMessage(f"{where}: {len(items)} items, limit {MAX_ITEMS}")
    return tuple(each(item, f"{where}[{index}]") for index, item in enumerate(items))


def _map(each: Callable[[object, str], object], value: object, where: str) -> dict[str, object]:
    if not isinstance(value, collections.abc.Mapping):
        raise MalformedMessage(f"{where}: {type(value).__name__} is no map")
    if len(value) > MAX_ENTRIES:
        raise MalformedMessage(f"{where}: {len(value)} entries, limit {MAX_ENTRIES}")
    return {
        _text(MAX_TEXT, key, f"{where} key"): each(item, f"{where}[{str(key)[:40]!r}]")
        for key, item in value.items()
    }


def _text(limit: int, value: object, where: str) -> str:
    if not isinstance(value, str):
        raise MalformedMessage(f"{where}: {type(value).__name__} is no text")
    size = len(value.encode(errors="surrogatepass"))
    if size > limit:
        raise MalformedMessage(f"{where}: {size} bytes, limit {limit}")
    return value


def _id(value: object, where: str) -> str:
    text = _text(MAX_TEXT, value, where)
    try:
        return check_id(where, text)
    except ConfigError as error:
        raise MalformedMessage(str(error)) from error


def _word(words: tuple[str, ...], value: object, where: str) -> str:
    text = _text(MAX_TEXT, value, where)
    if text not in words:
        raise MalformedMessage(f"{where}: {text[:70]!r}, expected one of {words}")
    return text


def _number(value: object, where: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise MalformedMessage(f"{where}: {type(value).__name__} is no number")
    try:
        return float(value)
    except OverflowError as error:
        raise MalformedMessage(f"{where}: too large") from error


def _finite(value: object, where: str) -> float:
    number = _number(value, where)
    if not math.isfinite(number):
        raise MalformedMessage(f"{where}: {number} is not finite")
    return number


def _integer(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise MalformedMessage(f"{where}: no 64-bit integer")
    return value


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise MalformedMessage(f"{where}: {type(value).__name__} is neither true nor false")
    return value


def _bytes(value: object, where: str) -> bytes:
    if not isinstance(value, bytes) or len(value) > MAX_CHUNK:
        raise MalformedMessage(f"{where}: not bytes, or more than {MAX_CHUNK} of them")
    return value
