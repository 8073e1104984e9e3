"""docs/regions.md grows a tree whose leaves train: its commands do what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedml.cli.demo.federation import free_ports
from fedml.cli.demo.hospitals import SPLIT_SEED, admit
from tests.system.page import commands, play

PAGE = "docs/regions.md"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_page_grow_a_tree_that_trains(tmp_path: Path) -> None:
    text = "\n".join(commands(PAGE))
    ports = free_ports(4)
    for name, told, (port, enrolment) in (
        ("hub", "init hub ", ports[:2]),
        ("north", "init north --port 9443 --enrolment-port 9444", ports[2:]),
    ):
        assert text.count(told) == 1
        text = text.replace(told, f"init {name} --port {port} --enrolment-port {enrolment} ")
    look = "fedml coordinator sites "
    assert text.count(look) == 1
    wait = 'until [ "$(fedml coordinator sites | grep -c "breast_cancer/1 live")" = 2 ]; do :; done'
    text = text.replace(look, f"{wait}\n{look}")
    admit("breast_cancer", None, tmp_path / "build/demo/sites", SPLIT_SEED)
    done = play(text, tmp_path, 220)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert f"north is now the region north of localhost:{ports[0]}" in done.stdout
    assert "submitted breast_cancer-1" in done.stdout
    assert re.search(r"^ *bern +north +yes.* breast_cancer/1 live", done.stdout, re.M), done.stdout
    assert "receipts verified, head " in done.stdout, done.stdout
