"""The README's first commands do what it says, one after the other."""

import re
from pathlib import Path

import pytest

from fedml.cli.demo.federation import free_ports
from fedml.cli.demo.hospitals import SPLIT_SEED, admit
from tests.system.page import ROOT, play


@pytest.mark.slow
def test_the_five_minutes_of_the_readme_are_true(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text()
    [block] = re.findall(r"<!-- these commands are run by .*? -->\n```sh\n(.*?)```", text, re.S)
    port, enrolment = free_ports(2)
    taken = f"init hub --port {port} --enrolment-port {enrolment}"
    assert block.count("init hub ") == 1
    admit("breast_cancer", None, tmp_path / "build/demo/sites", SPLIT_SEED)
    done = play(block.replace("init hub ", f"{taken} "), tmp_path, 100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "submitted breast_cancer-1" in done.stdout
    assert "breast_cancer/1 is live" in done.stdout
    assert re.search(r"breast_cancer: epsilon 2\.99\d of 3\.5 spent", done.stdout), done.stdout
