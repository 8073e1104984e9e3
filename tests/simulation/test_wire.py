"""A simulated run honours the plan's wire, in every executor, as real sites do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedml.rounds import Wire
from fedml.simulation.executors.base import MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.processes import Processes
from fedml.simulation.executors.vectorised import Vectorised
from tests.simulation.worlds import engine, holdings, plan, recipe


def models(wire: Wire, make: MakeExecutor = Inline) -> list[str]:
    """Return the digest of the model after each round."""
    a_plan = replace(plan(), wire=wire)
    played = engine(a_plan, make(a_plan, recipe(), holdings(), Memory())).play()
    return [receipt.model for receipt in played.receipts]


@pytest.mark.parametrize("wire", [Wire(down="delta", up="zstd"), Wire(down="zstd")])
def test_what_loses_nothing_changes_nothing(wire: Wire) -> None:
    assert models(wire) == models(Wire())


@pytest.mark.parametrize("wire", [Wire(down="bf16"), Wire(up="bf16")])
def test_rounding_shows_in_each_direction(wire: Wire) -> None:
    assert models(wire) != models(Wire())


def test_how_it_is_packed_does_not_show() -> None:
    one, other = Wire(down="bf16", up="bf16"), Wire(down="bf16+delta", up="bf16+zstd")
    assert models(one) == models(other)


def test_processes_round_as_inline_does() -> None:
    wire = Wire(down="bf16", up="bf16")
    assert models(wire, Processes) == models(wire)


def test_a_cohort_at_once_is_rounded() -> None:
    assert models(Wire(up="bf16"), Vectorised) != models(Wire(), Vectorised)
