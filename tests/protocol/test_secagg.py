"""Messages of masked rounds survive the wire; what is out of shape is refused by one error."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from fedml.errors import ConfigError, MalformedMessage
from fedml.protocol import codec
from fedml.protocol.messages import SecaggSaid, SecaggTold, SiteId, TaskId
from fedml.protocol.secagg import (
    BOX,
    DIGEST,
    SHARE,
    SIGNATURE,
    Advert,
    Adverts,
    Boxes,
    Consent,
    Consents,
    Masking,
    Part,
    Secagg,
    Shares,
    Survivors,
    Unmasking,
)

BERN, OSLO = SiteId("bern"), SiteId("oslo")
CONTEXT = bytes(range(DIGEST))
ADVERT = Advert(CONTEXT, BERN, bytes(32), bytes(32), bytes(SIGNATURE))
MESSAGES = [
    ADVERT,
    Adverts(CONTEXT, (ADVERT, replace(ADVERT, site=OSLO))),
    Shares(CONTEXT, BERN, {OSLO: bytes(BOX)}, bytes(DIGEST)),
    Boxes(CONTEXT, {BERN: bytes(BOX), OSLO: bytes(BOX)}),
    Survivors(CONTEXT, (BERN, OSLO)),
    Consent(CONTEXT, BERN, bytes(SIGNATURE)),
    Consents(CONTEXT, {BERN: bytes(SIGNATURE)}),
    Unmasking(CONTEXT, BERN, {BERN: bytes(SHARE)}, {OSLO: bytes(SHARE)}),
]
MASKING = Masking(2, (BERN, OSLO), 2, (Part("delta:float32", 10, 0.5),), Secagg("sa1"))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_each_message_comes_back_as_it_was(message: object) -> None:
    assert codec.decode(type(message), codec.encode(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_bytes_of_another_length_are_refused(message: object) -> None:
    """Whatever field of bytes is cut, by a byte: the value cannot be made, nor be decoded."""
    tried = 0
    for field in fields(message):  # type: ignore[arg-type]
        value = getattr(message, field.name)
        if isinstance(value, bytes):
            wrong: object = value[1:]
        elif isinstance(value, dict):
            wrong = {site: item[1:] for site, item in value.items()}
        else:
            continue
        tried += 1
        with pytest.raises(ConfigError):
            replace(message, **{field.name: wrong})  # type: ignore[type-var]
    assert tried


def test_a_message_of_wrong_length_from_the_wire_is_malformed() -> None:
    raw = codec.encode(Survivors(CONTEXT, (BERN,))).replace(CONTEXT, CONTEXT[1:] + b"x")
    assert codec.decode(Survivors, raw).context != CONTEXT
    for kind in (Advert, Adverts, Shares, Boxes, Survivors, Consent, Consents, Unmasking):
        with pytest.raises(MalformedMessage):
            codec.decode(kind, b"")


def test_envelopes_travel_with_commands_and_events() -> None:
    data = codec.encode(ADVERT)
    told = SecaggTold(TaskId("t"), "boxes", data)
    said = SecaggSaid(TaskId("t"), "advert", data)
    assert codec.decode_command(codec.encode_command(told)) == told
    assert codec.decode_event(codec.encode_event(said)) == said


def test_an_order_s_masking_comes_back_as_it_was() -> None:
    assert Masking.from_json(MASKING.to_json()) == MASKING


def test_whole_parts_are_named_so_and_no_others_are() -> None:
    """A site from before, which knows no word of whole parts, reads all other orders."""
    assert "whole" not in MASKING.to_json()
    shared = replace(MASKING, parts=(Part("noised", 3, 1.0, whole=True),))
    assert Masking.from_json(shared.to_json()) == shared
    for wrong in ({"clip": 2.0}, {"fine": True}):
        with pytest.raises(ConfigError, match="whole numbers are not fine, and have clip 1"):
            replace(shared.parts[0], **wrong)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"attempt": 1}', MASKING.to_json()[:-2]])
def test_masking_that_is_none_is_malformed(text: str) -> None:
    with pytest.raises(MalformedMessage, match="masking: "):
        Masking.from_json(text)
