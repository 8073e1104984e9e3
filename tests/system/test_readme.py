"""The README's first commands do what it says, one after the other."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedml.cli.demo.federation import free_ports
from fedml.cli.demo.hospitals import SPLIT_SEED, admit

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_five_minutes_of_the_readme_are_true(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    [block] = re.findall(r"<!-- these commands are run by .*? -->\n```sh\n(.*?)```", text, re.S)
    port, enrolment = free_ports(2)
    taken = f"init hub --port {port} --enrolment-port {enrolment}"
    assert block.count("init hub ") == 1
    (tmp_path / "script").write_text(block.replace("init hub ", f"{taken} "))
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
        timeout=100,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "submitted breast_cancer-1" in done.stdout
    assert "breast_cancer/1 is live" in done.stdout
    assert re.search(r"breast_cancer: epsilon (2\.9|3\.0)\d+ of 3\.5 spent", done.stdout), (
        done.stdout
    )
