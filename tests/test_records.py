"""Records read back what they wrote, and say all that is wrong at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from fedml.errors import ConfigError
from fedml.protocol.messages import Privacy, RunId, SiteId
from fedml.protocol.operations import Counted, Receipt
from fedml.records import from_record, to_record


@dataclass(frozen=True)
class Box:
    """All the shapes that a record may have."""

    size: float
    count: int
    tags: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"
    limit: float | None = None
    inner: Privacy = field(default_factory=Privacy)
    scores: dict[str, float] = field(default_factory=dict)
    open: bool = False


def test_a_record_reads_back_as_it_was() -> None:
    box = Box(1.5, 2, ("x", "y"), "b", 3.0, Privacy("record", 1.0, 1e-5), {"m": 0.5}, True)
    assert from_record(Box, to_record(box), "box") == box


def test_a_receipt_reads_back_as_it_was() -> None:
    counted = (Counted(SiteId("bern"), 3.0, "ab", 0.5),)
    receipt = Receipt(RunId("r"), 1, 2, (SiteId("bern"),), counted, {"kyoto": "late"}, kind="train")
    assert from_record(Receipt, to_record(receipt), "receipt") == receipt


def test_whole_numbers_in_float_fields_are_written_as_floats() -> None:
    assert to_record(Box(60, 2, limit=3)) == to_record(Box(60.0, 2, limit=3.0))
    assert repr(to_record(Box(60, 2))).startswith("{'size': 60.0, 'count': 2")


def test_all_problems_are_told_at_once() -> None:
    raw = {"size": "big", "count": 1.5, "tags": "x", "kind": "c", "inner": {"mode": "x"}, "hue": 1}
    with pytest.raises(ConfigError) as caught:
        from_record(Box, raw, "box")
    text = str(caught.value)
    for part in ("box.size 'big'", "box.count 1.5", "box.tags 'x'", "box.kind 'c'", "box.hue is"):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize("bad", [True, None, float("nan"), float("inf"), "1"])
def test_a_number_is_a_finite_number(bad: object) -> None:
    with pytest.raises(ConfigError, match=r"box\.size"):
        from_record(Box, {"size": bad, "count": 1}, "box")


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"box\.size is missing; box\.count is missing"):
        from_record(Box, {}, "box")
