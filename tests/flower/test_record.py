"""The record of replies: whole, or cut at the last whole one, and never something else."""

from pathlib import Path

import pytest

from fedml.errors import Corrupt
from fedml.flower.record import Kept, Record

ANSWERS = {
    (1000, 0): Kept(b"q" * 32, b"reply", b"context"),
    (1001, 0): Kept(b"r" * 32, b"", b"x" * 100),
    (1000, 1): Kept(b"s" * 32, b"y" * 50, b""),
}


def written(path: Path) -> bytes:
    record = Record(path, least=0)
    for (site, ordinal), kept in ANSWERS.items():
        record.keep(site, ordinal, kept)
    record.close()
    return path.read_bytes()


def found(path: Path) -> list[Kept | None]:
    record = Record(path)
    answers = [record.find(*key) for key in ANSWERS]
    record.close()
    return answers


def test_what_was_kept_is_found_after_opening_it_again(tmp_path: Path) -> None:
    written(tmp_path / "r")
    assert found(tmp_path / "r") == list(ANSWERS.values())
    record = Record(tmp_path / "r")
    assert record.find(1002, 0) is None
    record.discard()
    assert not (tmp_path / "r").exists()


def test_a_torn_end_is_cut_off_wherever_it_tears(tmp_path: Path) -> None:
    data = written(tmp_path / "r")
    whole = 0
    for length in range(len(data) + 1):
        (tmp_path / "r").write_bytes(data[:length])
        answers = [kept for kept in found(tmp_path / "r") if kept]
        assert answers == list(ANSWERS.values())[: len(answers)]
        assert whole <= len(answers)
        whole = len(answers)
    assert whole == len(ANSWERS)


def test_after_a_torn_end_it_is_gone_on_with(tmp_path: Path) -> None:
    data = written(tmp_path / "r")
    (tmp_path / "r").write_bytes(data[:-1])
    record = Record(tmp_path / "r", least=0)
    assert record.find(1000, 1) is None
    record.keep(1000, 1, ANSWERS[1000, 1])
    record.close()
    assert (tmp_path / "r").read_bytes() == data


def test_damage_before_the_end_is_told(tmp_path: Path) -> None:
    data = bytearray(written(tmp_path / "r"))
    data[70] ^= 1
    (tmp_path / "r").write_bytes(data)
    with pytest.raises(Corrupt, match="damaged at byte 0"):
        Record(tmp_path / "r")


def test_what_waits_is_on_the_disk_after_a_flush_and_no_sooner(tmp_path: Path) -> None:
    record = Record(tmp_path / "r", least=1000.0)
    record.keep(1000, 0, ANSWERS[1000, 0])
    assert found(tmp_path / "r")[0] is None
    record.flush()
    assert found(tmp_path / "r")[0] == ANSWERS[1000, 0]
    record.close()
