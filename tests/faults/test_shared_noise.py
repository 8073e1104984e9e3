"""Sites that share the noise of their masked sum, as real programs over mutual TLS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fedml.params import Params
from fedml.privacy.accounting import epsilon, training_event
from fedml.privacy.chain import read
from fedml.privacy.shares import grain_of
from fedml.protocol.messages import Privacy, SiteId, Training
from fedml.protocol.operations import RunDetail
from fedml.protocol.secagg import Secagg
from fedml.rounds import Cohort, Evaluation, Plan
from tests.faults import fleet as fleets
from tests.faults.fleet import TRAIN, first_params
from tests.faults.test_masked import Veiled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SITES = ("bern", "kyoto", "oslo", "quito")
WARY = "quito"  # its operator assumes that one other site helps the coordinator
SA1 = Secagg("sa1", weight_cap=100.0, scores=("accuracy",), patience=30.0)
STEP = Training(lr=0.05, steps=1)


class Sharing(Veiled):
    """Four sites whose policies let them share noise."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, SITES, heartbeat=1.0, grace=4.0)
        self._policy = self._policy.replace('"none"', '"record_distributed"')
        self._policy += (
            f'[datasets.whole]\ntrain = "train.csv"\nrows = {TRAIN}\nrecipes = ["small"]\n'
            'privacy = "site_distributed"\nsite_epsilon = 6\ndelta = 1e-5\n'
        )

    def make(self, addresses: dict[str, str] | None = None) -> None:  # type: ignore[override]
        super().make(addresses)
        path = self.site(WARY) / "policy.toml"
        path.write_text("colluders = 1\n" + path.read_text())


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharing]:
    a_fleet = Sharing(tmp_path_factory.mktemp("sharing"))
    with a_fleet:
        a_fleet.found()
        yield a_fleet


def plan(seed: int, sharers: int) -> Plan:
    base = fleets.plan(seed, recipe="small", rounds=2)
    privacy = Privacy(
        "record_distributed", 5.0, 1e-5, rounds=2, evaluation_epsilon=0.5, sharers=sharers
    )
    cohort = Cohort(quorum=3, deadline=60.0, sites=tuple(map(SiteId, SITES)))
    return replace(base, training=STEP, privacy=privacy, cohort=cohort, secagg=SA1)


def trained(detail: RunDetail) -> list[int]:
    """Return how many counted in each round that gave a model."""
    return [len(r.counted) for r in detail.receipts if r.kind == "train" and r.model]


def off_grid(last: Params, a_plan: Plan, weight: int) -> float:
    """Return how far, in steps, rounds' sums are from whole steps of the shared noise's grid.

    Each round's sites weigh `weight` together.
    """
    step, first = grain_of(a_plan.training, a_plan.privacy) / weight, first_params(a_plan)
    worst = 0.0
    for name, tensor in last.items():
        steps = (tensor.double() - first[name].double()) / step
        assert float(steps.abs().max()) > 1  # noise, at least
        worst = max(worst, float((steps - steps.round()).abs().max()))
    return worst


def test_a_masked_sum_is_whole_steps_of_the_shared_noise_and_each_site_is_charged_for_it(
    fleet: Sharing,
) -> None:
    a_plan = plan(1, sharers=2)
    run = fleet.submit(a_plan)
    detail = fleet.finish(run)
    assert trained(detail) == [4, 4], detail.receipts
    assert off_grid(fleet.params(run, 2), a_plan, 4 * TRAIN) < 0.05  # float32 of the model
    event = training_event(STEP, a_plan.privacy, TRAIN)
    for site in SITES:
        charged = [e for e in fleet.ledger(site) if e.run == run and e.state == "charged"]
        assert [e.event for e in charged if e.part == "train"] == [event, event]
        assert epsilon([event, event], 1e-5) <= 5.0
    assert {c.weight for r in detail.receipts for c in r.counted} == {0.0}
    assert not any(r.metrics for r in detail.receipts)  # nothing beside the sum
    assert [r.scores for r in detail.receipts if r.kind == "evaluate"]


def test_a_site_that_assumes_colluders_stays_out_where_the_others_noise_is_too_little(
    fleet: Sharing,
) -> None:
    """Three are left, which is the quorum and the sharers: the sum has just the whole noise."""
    a_plan = plan(2, sharers=3)
    run = fleet.submit(a_plan)
    detail = fleet.finish(run)
    assert trained(detail) == [3, 3]
    [reason] = {r.missing[WARY] for r in detail.receipts if WARY in r.missing}
    assert "policy colluders = 1: the masked sum may be of 3 sites, whose 2 honest ones" in reason
    assert off_grid(fleet.params(run, 2), a_plan, 3 * TRAIN) < 0.05
    assert not [e for e in fleet.ledger(WARY) if e.run == run]


def test_whole_sites_share_the_noise_of_their_sum_and_pay_from_their_own_ledgers(
    fleet: Sharing,
) -> None:
    shared = replace(plan(3, sharers=2).privacy, mode="site_distributed", evaluation_epsilon=0.0)
    a_plan = replace(
        plan(3, sharers=2),
        dataset="whole",
        training=Training(lr=0.05, steps=3, batch_size=8),
        privacy=shared,
        evaluation=Evaluation(at_end=False),
        gates=(),
        rounds=2,
    )
    run = fleet.submit(a_plan)
    detail = fleet.finish(run)
    assert trained(detail) == [4, 4], detail.receipts
    assert off_grid(fleet.params(run, 2), a_plan, 4) < 0.05
    event = training_event(a_plan.training, shared, TRAIN)
    for site in SITES:
        entries = read(fleet.site(site) / "ledger" / "site" / "whole.jsonl")
        assert [(e.event, e.state) for e in entries if e.run == run] == [(event, "charged")] * 2
