"""The door of the benchmarks. Times are never tested: they belong to the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.catalogue import select

SLOW = ("_vs_", "_bf16", "500MB", "memory32")  # these take minutes
QUICK = [one.name for one in select([]) if not any(slow in one.name for slow in SLOW)]
ROOT = Path(__file__).parents[2]
NAMES = [
    "simulation/w1",
    "transport/100MB",
    "transport/1MB",
    "transport/memory",
    "transport/sites",
]


def door(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_list_has_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert set(NAMES) <= set(capsys.readouterr().out.split())


def test_the_start_of_a_name_stands_for_all_that_begin_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--list", "transport/1"]) == 0
    assert capsys.readouterr().out.split() == ["transport/100MB", "transport/1MB"]


def test_an_unknown_name_is_one_line_with_the_names_there_are() -> None:
    done = door("transprot")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "'transprot'" in line
    assert all(name in line for name in NAMES)


def test_a_whole_name_stands_for_itself_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "simulation/w2"]) == 0
    assert capsys.readouterr().out.split() == ["simulation/w2"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_runs_and_prints_one_object(name: str) -> None:
    done = door(name, "--quick", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    record = json.loads(line)
    assert record.keys() == {"name", "value", "unit", "limit", "ratio", "extra"}
    assert record["value"] > 0
    assert record["limit"] > 0
    assert record["ratio"] == pytest.approx(record["value"] / record["limit"])
