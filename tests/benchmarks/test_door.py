"""The door of the benchmarks. Times are never tested: they belong to the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ["simulation/w1", "transport/100MB", "transport/1MB", "transport/memory"]


def door(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_list_has_every_benchmark() -> None:
    done = door("--list")
    assert done.returncode == 0
    assert set(NAMES) <= set(done.stdout.split())


def test_the_start_of_a_name_stands_for_all_that_begin_so() -> None:
    assert door("--list", "transport/1").stdout.split() == ["transport/100MB", "transport/1MB"]


def test_an_unknown_name_is_one_line_with_the_names_there_are() -> None:
    done = door("transprot")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "'transprot'" in line
    assert all(name in line for name in NAMES)


@pytest.mark.slow
def test_every_benchmark_runs_and_prints_one_object_a_line() -> None:
    done = door("--quick", "--json")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    skipped = done.stderr.count("  skipped: ")
    assert len(records) + skipped == len(door("--list").stdout.split())
    for record in records:
        assert record.keys() == {"name", "value", "unit", "limit", "ratio", "extra"}
        assert record["value"] > 0
        assert record["limit"] > 0
        assert record["ratio"] == pytest.approx(record["value"] / record["limit"])
