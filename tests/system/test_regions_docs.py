"""docs/regions.md grows a tree whose leaves train: its commands do what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedml.cli.demo.federation import free_ports
from fedml.cli.demo.hospitals import SPLIT_SEED, admit
from tests.system.page import ROOT, commands

PAGE = "docs/regions.md"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_commands_of_the_page_grow_a_tree_that_trains(tmp_path: Path) -> None:
    text = "\n".join(commands(PAGE))
    ports = free_ports(4)
    for name, told, (port, enrolment) in (
        ("hub", "init hub ", ports[:2]),
        ("north", "init north --port 9443 --enrolment-port 9444", ports[2:]),
    ):
        assert text.count(told) == 1
        text = text.replace(told, f"init {name} --port {port} --enrolment-port {enrolment} ")
    (tmp_path / "script").write_text(text)
    admit("breast_cancer", None, tmp_path / "build/demo/sites", SPLIT_SEED)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "fedml").write_text(f'#!/bin/sh\nexec {sys.executable} -m fedml "$@"\n')
    (programs / "fedml").chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run(
        [bash, "-c", "set -eu; trap 'kill $(jobs -p)' EXIT; . ./script"],
        cwd=tmp_path,
        env={"PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert f"north is now the region north of localhost:{ports[0]}" in done.stdout
    assert "submitted breast_cancer-1" in done.stdout
    assert re.search(r"^ *bern +north +yes", done.stdout, re.M), done.stdout
    assert "receipts verified, head " in done.stdout, done.stdout
