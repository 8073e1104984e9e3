"""Fail points do what they are told, once, and nothing at all when nobody told them."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fedml import failpoints
from fedml.errors import ConfigError
from fedml.failpoints import POINTS, Strike

ROOT = Path(__file__).parents[1]
PURE = ("rounds", "strategies", "learning", "protocol", "params.py", "privacy/accounting.py",
        "privacy/mechanisms.py", "privacy/noise.py", "privacy/sampling.py", "site/gate.py",
        "site/policy.py", "simulation")  # fmt: skip


def played(code: str, armed: str | None) -> subprocess.CompletedProcess[str]:
    """Run a program that has `reach` and `durable`, with FEDML_FAILPOINT set to `armed`."""
    environment = {k: v for k, v in os.environ.items() if k != failpoints.VARIABLE}
    environment |= {"PYTHONPATH": str(ROOT)} | ({} if armed is None else {"FEDML_FAILPOINT": armed})
    head = "import sys; from pathlib import Path; from fedml import durable, failpoints\n"
    return subprocess.run(
        [sys.executable, "-c", head + "reach = failpoints.reach\n" + code],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_without_the_variable_nothing_is_armed_and_any_name_passes() -> None:
    done = played("reach('no such point'); print(failpoints._armed)", None)
    assert (done.stdout.strip(), done.returncode) == ("None", 0)
    assert played("print(failpoints._armed)", "").stdout.strip() == "None"


def test_the_count_th_pass_is_the_last(tmp_path: Path) -> None:
    code = "for n in range(5):\n    reach('work.done'); print(n, flush=True)"
    done = played(code, "work.done:3:kill")
    assert done.returncode == -signal.SIGKILL
    assert done.stdout.split() == ["0", "1"]


def test_a_full_disk_is_met_once_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        f"path = Path({str(path)!r})\n"
        "try: durable.replace(path, b'new')\n"
        "except Exception as error: print(error, path.read_bytes())\n"
        "durable.replace(path, b'newer')"
    )
    done = played(code, "durable.replace:1:enospc")
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stdout
    assert "b'old'" in done.stdout
    assert path.read_bytes() == b"newer"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_delay_ends(tmp_path: Path) -> None:
    code = "import time; t = time.monotonic(); reach('work.done'); print(time.monotonic() - t)"
    assert float(played(code, "work.done:1:delay=0.4").stdout) >= 0.4


def test_who_hangs_hangs() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from fedml import failpoints as f\nprint(1, flush=True)\n"
         "f.reach('work.done'); print(2, flush=True)"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FEDML_FAILPOINT": "work.done:1:hang"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
    finally:
        process.kill()
        assert process.communicate()[0] == b""


def test_a_program_under_way_is_armed_by_a_file_that_goes_when_it_struck(tmp_path: Path) -> None:
    file = tmp_path / "strikes"
    code = (
        f"file = Path({str(file)!r})\n"
        "reach('work.done'); reach('work.done'); print('a', flush=True)\n"
        "file.write_text('work.done:2:kill'); reach('work.done'); print('b', flush=True)\n"
        "reach('result.kept'); print('c', flush=True)\n"
        "reach('work.done'); print('d', flush=True)"
    )
    done = played(code, f"@{file}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.split() == [
        "a",
        "b",
        "c",
    ]  # what was passed before it was armed is not counted
    assert not file.exists()


@pytest.mark.parametrize(
    "text", ["work.done", "work.done:0:kill", "wrok.done:1:kill", "work.done:1:burn",
             "work.done:1:delay", "work.done:1:delay=x", "work.done:1:enospc", "work.done:x:kill"]
)  # fmt: skip
def test_what_is_no_strike_is_one_line_with_the_way_out(text: str) -> None:
    with pytest.raises(ConfigError, match="write point:count:action"):
        Strike.parse(text)
    done = subprocess.run(
        [sys.executable, "-m", "fedml", "coordinator", "run", "/nowhere"],
        env={**os.environ, "FEDML_FAILPOINT": text}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "write point:count:action" in done.stderr


def reached(folder: Path) -> Counter[str]:
    """Return how often each point stands in the code below `folder`, or in that file."""
    found: Counter[str] = Counter()
    for path in [folder] if folder.is_file() else sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="failpoints"), attr="reach"),
                    args=[ast.Constant(value=str(point))],
                ):
                    found[point] += 1
                case _:
                    pass
    return found


def test_every_point_stands_in_the_code_and_has_its_line_in_the_list() -> None:
    assert reached(ROOT / "fedml").keys() == POINTS.keys()


def test_what_decides_has_no_fail_points() -> None:
    for part in PURE:
        place = ROOT / "fedml" / part
        assert place.exists(), part
        assert not reached(place), part
        files = [place] if place.is_file() else place.rglob("*.py")
        assert not [f for f in files if "failpoints" in f.read_text()], part


def test_passing_costs_next_to_nothing() -> None:
    """Compared with as many calls of an empty function."""
    code = (
        "import timeit\ndef empty(point): pass\n"
        "ours = min(timeit.repeat(lambda: reach('work.done'), number=200_000, repeat=5))\n"
        "none = min(timeit.repeat(lambda: empty('work.done'), number=200_000, repeat=5))\n"
        "print(ours / none)"
    )
    assert float(played(code, None).stdout) < 5
