"""docs/custom-strategy.md makes a strategy from nothing: its files and commands do what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fedml.cli.demo.federation import free_ports
from fedml.cli.demo.hospitals import SPLIT_SEED, admit
from fedml.installed import digest_of
from tests.system.page import ROOT, commands, play

PAGE = "docs/custom-strategy.md"
CHANGED = """
fedml run show breast_cancer-2 --json > masked.json
sed -i 's/lr: float = 0.1/lr: float = 0.2/' fedlion.py
again() { fedml run submit task=breast_cancer strategy=own "strategy.file=$1" privacy=record \
  privacy.epsilon=3 cohort.quorum=3 cohort.deadline=120; }
if again fedlion.py:FedLion; then exit 3; fi
cp fedlion.py other.py
sed -i 's/class FedLion/class Other/' other.py
if again other.py:Other; then exit 4; fi
if fedml coordinator allow hub --strategy fedlion.py:FedLion --name fedavg; then exit 5; fi
echo 'class Nothing: ...' > nothing.py
if fedml coordinator allow hub --strategy nothing.py:Nothing; then exit 6; fi
"""


def files() -> dict[str, str]:
    """Return the page's files by name."""
    text = (ROOT / PAGE).read_text()
    return dict(re.findall(r"^<!-- (\S+\.py) -->\n```python\n(.*?)^```", text, re.S | re.M))


def test_the_strategy_is_twenty_lines() -> None:
    code = files()["fedlion.py"]
    kind = code[code.index("@dataclass") :]
    assert len([line for line in kind.splitlines() if line.strip()]) <= 20
    assert code.startswith('"""FedLion: Chen et al. 2023, arXiv:2302.06675')


@pytest.mark.slow
@pytest.mark.timeout(540)
def test_the_page_from_nothing_to_masked_private_rounds(tmp_path: Path) -> None:
    for name, text in files().items():
        (tmp_path / name).write_text(text)
    port, enrolment = free_ports(2)
    script = "\n".join(commands(PAGE))
    assert script.count("init hub") == 1
    script = script.replace("init hub", f"init hub --port {port} --enrolment-port {enrolment}")
    admit("breast_cancer", None, tmp_path / "build/demo/sites", SPLIT_SEED)
    done = play(script + CHANGED, tmp_path, 500)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "1 passed" in done.stdout
    for mode in ("record", "secagg", "site_central"):
        assert f"\n{mode}: yes\n" in done.stdout
    digest = digest_of(files()["fedlion.py"].encode())
    for run in ("lion", "private", "masked"):
        folder = tmp_path / "outputs" / run
        assert json.loads((folder / "summary.json").read_text())["state"] == "done"
        assert json.loads((folder / "plan.json").read_text())["strategy"]["digest"] == digest
    for run in ("breast_cancer-1", "breast_cancer-2"):
        assert re.search(rf"^{run}  done  5/5 rounds", done.stdout, re.M), done.stdout[-3000:]
    assert done.stdout.count("receipts verified, head ") == 2
    masked = json.loads((tmp_path / "masked.json").read_text())
    counted = [one for receipt in masked["receipts"] for one in receipt["counted"]]
    assert len(counted) >= 15
    assert {one["weight"] for one in counted} == {0.0}  # the coordinator does not know them
    assert len(list((tmp_path / "hub" / "strategies").iterdir())) == 1
    assert f"strategy fedlion: here is {digest[:12]}, and " in done.stderr
    assert "strategy 'other' is not installed; there are" in done.stderr
    assert "has the name of one of ours; give it another" in done.stderr
    assert "is no Strategy: it must be a frozen dataclass; mend the file" in done.stderr
    assert "Traceback" not in done.stderr
