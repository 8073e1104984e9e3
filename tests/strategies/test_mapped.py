"""Models that lie in files are summed and moved with the same bits as in memory, and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedml import params as params_module
from fedml.params import Params, encode, pieces, read
from fedml.protocol.messages import SiteId, TaskId
from fedml.protocol.tasks import Update
from fedml.strategies import REDUCERS, Aggregate, Reducer, WeightedMean, reducers
from fedml.strategies.robust import cohort

ROOT = Path(__file__).parents[2]


def model(seed: int, size: int = 5000) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return Params(
        {
            "w": torch.randn(size, generator=generator),
            "v": torch.randn(7, 3, generator=generator, dtype=torch.float64),
            "h": torch.randn(900, generator=generator).bfloat16(),
            "n": torch.arange(seed, seed + 5),
        }
    )


def filed(path: Path, params: Params) -> Params:
    path.write_bytes(b"".join(encode({"": params})))
    return read(path)[""]


def total(deltas: list[Params], reducer: Reducer | None = None) -> Aggregate:
    reduction = (reducer or WeightedMean()).start()
    for number, delta in enumerate(deltas, 1):
        reduction.add(Update(TaskId("t"), 1, SiteId(f"s{number}"), delta, float(number)))
    assert reduction.result() is reduction.result()
    return reduction.result()


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a few thousand elements be many windows."""
    monkeypatch.setattr(params_module, "_WINDOW", 1024)


@pytest.mark.parametrize(
    "act",
    [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: (a * 0.3).zip(b, torch.maximum),
        lambda a, b: a.map(torch.square) + b * 2,
    ],
)
def test_arithmetic_with_files_has_the_bits_of_arithmetic_in_memory(
    tmp_path: Path, act: Callable[[Params, Params], Params]
) -> None:
    a, b = model(1), model(2)
    wanted = act(a, b)
    in_file = filed(tmp_path / "a", a)
    for got in (
        act(in_file, b),
        act(a, filed(tmp_path / "b", b)),
        act(in_file, filed(tmp_path / "b", b)),
    ):
        assert got == wanted
        assert got.digest() == wanted.digest()
    assert in_file == a
    assert b"".join(pieces({"x": in_file})) == b"".join(encode({"x": a}))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -(2.0**100)])
def test_one_bad_value_anywhere_in_a_file_is_seen(tmp_path: Path, bad: float) -> None:
    for place in (0, 1023, 1024, 4999):
        values = torch.zeros(5000)
        values[place] = bad
        params = filed(tmp_path / f"{place}", Params({"w": values}))
        assert repr(params.peak()) == repr(abs(bad))


def test_a_sum_of_files_has_the_bits_of_a_sum_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = [model(seed) for seed in range(4)]
    wanted = total(deltas)
    files = [filed(tmp_path / f"{n}", delta) for n, delta in enumerate(deltas)]
    assert total(files).delta == wanted.delta
    monkeypatch.setattr(reducers, "_MANY", 16)  # the mean comes to lie where the sum was
    for some in (files, deltas):
        assert total(some).delta == wanted.delta
        assert total(some).delta.digest() == wanted.delta.digest()


@pytest.mark.parametrize("kind", REDUCERS.values(), ids=REDUCERS)
def test_every_reducer_makes_the_same_of_files_even_if_they_are_deleted_meanwhile(
    kind: type[Reducer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cohort, "_ELEMENTS", 4096)
    reducer = kind(**({"root": "s1"} if hasattr(kind(), "root") else {}))
    deltas = [model(seed) for seed in range(reducer.least + 1)]
    files = [filed(tmp_path / f"{n}", delta) for n, delta in enumerate(deltas)]
    for path in tmp_path.iterdir():
        path.unlink()
    one, other = total(files, reducer), total(deltas, reducer)
    assert one.delta.digest() == other.delta.digest()
    assert one.damped == other.damped


_ROUND = """
import json, sys, torch
from pathlib import Path
from fedml.params import Params, encode, pieces, read
from fedml.protocol.tasks import Update
from fedml.strategies import build

folder, sites, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
strategy = build({"name": "fedavg", "reducer": {"name": sys.argv[4]}})

def memory(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what + ":"))

state = strategy.start(read(folder / "model")[""])
warm = state.params.peak()
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
reduction = strategy.reducer.start()
for site in range(sites):
    delta = read(folder / "update")["delta"]
    assert delta.is_finite()
    reduction.add(Update("t", 1, f"s{site}", delta, 1.0 + site))
    del delta
total = reduction.result()
del reduction
state = strategy.advance(state, total)
del total
assert state.params.is_finite()
with (folder / "next").open("wb") as file:
    for piece in pieces({"": state.params}):
        file.write(piece)
print(json.dumps((memory("VmHWM") - before) / (4 * size)))
"""


def models_of_memory(folder: Path, sites: int, size: int, reducer: str) -> float:
    """Return by how many models a round of updates in files raises the memory of a process."""
    command = [sys.executable, "-c", _ROUND, str(folder), str(sites), str(size), reducer]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(json.loads(done.stdout))


@pytest.mark.parametrize("reducer", ["weighted-mean", "robust", "multi-krum", "median"])
def test_a_round_takes_the_memory_of_its_sum_however_many_sites(
    tmp_path: Path, reducer: str
) -> None:
    """Robust rules need the whole cohort, and leave it in its files."""
    size = 8_000_000
    values = Params({"w": torch.randn(size) * 0.01})
    for name, part in (("model", ""), ("update", "delta")):
        (tmp_path / name).write_bytes(b"".join(encode({part: values})))
    few, many = (models_of_memory(tmp_path, n, size, reducer) for n in (5, 12))
    assert few < 2.5
    assert abs(many - few) < 0.25
