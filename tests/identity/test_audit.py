"""What was done cannot be undone in the log without it showing."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from fedml.errors import Corrupt
from fedml.identity.audit import START, AuditLog, Entry


def filled(path: Path) -> AuditLog:
    log = AuditLog(path)
    for number in range(4):
        log.note("operator eve", f"Operations/Submit {number}", 1000.0 + number)
    log.note("site mercy", "Operations/Submit", 2000.0, "role 'site' may not call")
    return log


def rewrite(path: Path, lines: list[bytes]) -> None:
    """Write records with right checksums, as one who knows the format would."""
    path.write_bytes(b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines))


def bodies(path: Path) -> list[bytes]:
    return [line.split(b" ", 1)[1] for line in path.read_bytes().splitlines()]


def test_entries_survive_a_restart_in_order(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.log")
    again = AuditLog(tmp_path / "audit.log")
    assert again.entries() == log.entries()
    assert again.entries()[-1] == Entry(
        "site mercy", "Operations/Submit", 2000.0, "role 'site' may not call"
    )
    assert again.head == log.head != START


def test_a_changed_entry_shows(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    filled(path)
    lines = bodies(path)
    record = json.loads(lines[1])
    record["who"] = "operator bob"
    lines[1] = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    rewrite(path, lines)
    with pytest.raises(Corrupt, match="entry 1 was changed"):
        AuditLog(path)


def test_a_removed_a_swapped_and_a_doubled_entry_show(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    filled(path)
    a, b, c, d, e = bodies(path)
    for lines in ([a, c, d, e], [b, a, c, d, e], [a, b, b, c, d, e], [b, c, d, e]):
        rewrite(path, lines)
        with pytest.raises(Corrupt, match="was changed"):
            AuditLog(path)


def test_a_cut_end_shows_against_a_head_noted_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    head = filled(path).head
    AuditLog(path).verify(head)
    rewrite(path, bodies(path)[:-1])
    log = AuditLog(path)
    with pytest.raises(Corrupt, match="its end was cut off"):
        log.verify(head)


def test_an_older_head_is_still_on_the_chain(tmp_path: Path) -> None:
    log = filled(tmp_path / "audit.log")
    head = log.head
    log.note("operator eve", "more", 3000.0)
    log.verify(head)
    log.verify(START)
