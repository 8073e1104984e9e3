"""`executor=auto` chooses by what is counted, and says why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fedml.learning.recipe import Rows
from fedml.protocol.messages import SiteId
from fedml.rounds import Cohort
from fedml.simulation.executors import auto
from fedml.simulation.executors.auto import Auto
from fedml.simulation.executors.base import Holding, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.processes import Processes
from fedml.simulation.executors.vectorised import Vectorised
from tests.simulation.worlds import holdings, plan, recipe

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU changes the choice")


class Big:
    """A recipe whose step keeps a core busy."""

    labels = ("no", "yes")

    def build(self) -> nn.Module:
        return nn.Sequential(nn.Linear(30, 2000), nn.ReLU(), nn.Linear(2000, 2000))

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return output.square().mean()

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        return {}

    def read(self, path: object) -> Rows:
        raise NotImplementedError

    def example(self, rows: int) -> Tensor:
        return torch.zeros(rows, 30)


@without_gpu
def test_small_models_are_stacked(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(Auto(plan(), recipe(), holdings(), Memory()).chosen, Vectorised)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("executor: vectorised, for a step is 0.0")
    assert "4 sites a round" in line


@without_gpu
def test_big_models_are_spread_over_cores(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "usable_cores", lambda: 2)
    assert isinstance(Auto(plan(), Big(), holdings(), Memory()).chosen, Processes)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("executor: processes, for a step is 780 million operations")
    assert "keep 2 cores busy" in line


@without_gpu
def test_one_core_works_inline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "usable_cores", lambda: 1)
    assert isinstance(Auto(plan(), Big(), holdings(), Memory()).chosen, Inline)
    assert capsys.readouterr().out == "executor: inline, for there is only one core\n"


def test_one_site_works_inline(capsys: pytest.CaptureFixture[str]) -> None:
    site, holding = next(iter(holdings().items()))
    few: Mapping[SiteId, Holding] = {site: holding}
    alone = replace(plan(), cohort=Cohort(quorum=1, deadline=60.0))
    assert isinstance(Auto(alone, recipe(), few, Memory()).chosen, Inline)
    assert capsys.readouterr().out == "executor: inline, for there is only 1 site a round\n"


def test_a_sites_memory_is_the_one_that_was_given() -> None:
    memory = Memory()
    chosen = Auto(plan(), recipe(), holdings(), memory).chosen
    assert getattr(chosen, "memory", None) is memory
