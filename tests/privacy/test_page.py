"""docs/privacy.md claims what tests hold, names every mode, and computes what it prints."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import get_args

import pytest

from fedml.protocol.messages import PrivacyMode
from tests.faults.test_table import faults, rows

PAGE = Path(__file__).parents[2] / "docs" / "privacy.md"
TEXT = PAGE.read_text()


def section(title: str, text: str = TEXT) -> str:
    """Return what stands below a heading, up to the next one."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert found, f"no section {title!r}"
    return found[1]


def test_every_claim_names_tests_that_exist_or_says_not_yet() -> None:
    claims = rows(section("The claims"))
    assert len(claims) > 15
    assert not faults(claims)


def test_what_is_not_there_yet_is_marked_and_nothing_else_is() -> None:
    """A mark says what to switch on when the part it waits for is there."""
    lines = [line for line in section("The claims").splitlines() if line.startswith("| ")]
    for line in lines[1:]:
        assert ("<!-- when landed -->" in line) == line.endswith("| not yet |"), line


def test_a_claim_whose_test_is_gone_is_found() -> None:
    gone = section("The claims").replace("::test_no_certificate_no_entry", "::test_of_old")
    assert [fault for fault in faults(rows(gone)) if "test_of_old" in fault]


def test_the_modes_are_those_of_the_code() -> None:
    told = re.findall(r"^\| `(\w+)` \|", section("The modes"), re.M)
    assert tuple(told) == get_args(PrivacyMode)


def test_modes_of_the_future_are_comments() -> None:
    shown = re.sub(r"<!--.*?-->", "", section("The modes"), flags=re.S)
    for mode in ("patient", "site_central", "site_distributed"):
        assert f"`{mode}`" not in shown or mode in get_args(PrivacyMode)


def test_what_epsilon_means_is_computed() -> None:
    lines = re.findall(r"^\| ([\d.]+) \| ([\d.]+) % \|", section("The modes"), re.M)
    assert len(lines) == 4
    for epsilon, right in lines:
        percent = 100 / (1 + math.exp(-float(epsilon)))
        digits = len(right.partition(".")[2])
        assert float(right) == pytest.approx(percent, abs=0.5 * 10**-digits + 1e-9)
