"""What docs/simulate.md shows is what happens."""

import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.system.page import ROOT, play


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_and_the_snippet_of_the_page_work(tmp_path: Path) -> None:
    text = (ROOT / "docs/simulate.md").read_text()
    [block] = re.findall(r"<!-- these commands are run by .*? -->\n```sh\n(.*?)```", text, re.S)
    [snippet] = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "snippet.py").write_text(f"{snippet}\nprint(len(curve), len(sites))\n")
    done = play(f"{block}\n{sys.executable} snippet.py", tmp_path, 290)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done: candidate after 5 rounds") == 2
    assert "going on after round 5 of 5" in done.stdout
    assert done.stdout.endswith("5 5\n")
    assert len(pd.read_parquet(tmp_path / "outputs/first/results.parquet")) == 36
    assert (tmp_path / "outputs/mlflow.db").exists()
