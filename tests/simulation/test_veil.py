"""A simulation whose sums are masked comes to the plain one's model, with the production halves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from fedml.errors import ConfigError, Contradiction
from fedml.protocol.messages import Privacy, PrivacyMode, SiteId, TaskId, Training
from fedml.protocol.secagg import Secagg
from fedml.protocol.tasks import Task
from fedml.rounds import Evaluation, Gate, Plan, Wire
from fedml.simulation.engine import Outcome
from fedml.simulation.executors.base import Answer, Executor, MakeExecutor, Memory
from fedml.simulation.executors.inline import Inline
from fedml.simulation.executors.vectorised import Vectorised
from fedml.strategies import FedAdam, FedAvg, FedNova, QFedAvg, Scaffold, Strategy
from fedml.strategies.robust.coordinatewise import Median
from tests.simulation.worlds import Late, engine, holdings, plan, recipe, singles

SA1 = Secagg("sa1", clip=4.0, weight_cap=500.0, metrics={"loss": 50.0}, scores=("accuracy",))
LAST = SiteId("site-3")


def both(strategy: Strategy, **changes: object) -> tuple[Plan, Plan]:
    plain = replace(plan(strategy=strategy, quorum=3), **changes)  # type: ignore[arg-type]
    return plain, replace(plain, secagg=SA1)


def flat(outcome: Outcome) -> torch.Tensor:
    assert outcome.candidate is not None, outcome.end
    return torch.cat([tensor.double().flatten() for tensor in outcome.candidate.params.values()])


@pytest.mark.parametrize(
    "strategy", [FedAvg(), FedAdam(), Scaffold(), FedNova()], ids=lambda s: type(s).__name__
)
def test_a_masked_run_comes_to_the_plain_one_s_model_and_scores(strategy: Strategy) -> None:
    plain, masked = (engine(each).play() for each in both(strategy, rounds=4))
    assert (flat(plain) - flat(masked)).abs().max() < 1e-6  # float32, four times rounded
    assert plain.receipts[-1].scores["accuracy"] == pytest.approx(
        masked.receipts[-1].scores["accuracy"]
    )
    for clear, veiled in zip(plain.receipts, masked.receipts, strict=True):
        assert [one.site for one in veiled.counted] == [one.site for one in clear.counted]
        assert {one.weight for one in veiled.counted} == {0.0}


@dataclass
class Heard:
    """An executor that lets another one train, once; the same task again has the same answer."""

    executor: Executor
    answers: dict[TaskId, Answer] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        new = [task for task in tasks if task.id not in self.answers]
        for answer in singles(self.executor, new):
            assert answer.task is not None
            self.answers[answer.task] = answer
        yield from (self.answers[task.id] for task in tasks)


@pytest.mark.parametrize("mode", ["record_distributed", "site_distributed"])
@pytest.mark.parametrize("make", [Inline, Vectorised])
def test_sites_that_share_the_noise_of_a_masked_sum_come_to_the_plain_sum_s_model(
    make: MakeExecutor, mode: PrivacyMode
) -> None:
    """Noise is never drawn twice, so the same updates are summed both ways."""
    privacy = Privacy(mode, 3.0, 1e-5, clip=0.5, rounds=4, sharers=3)
    plain = replace(
        plan(strategy=FedAvg(), quorum=3, rounds=4, evaluation=Evaluation(at_end=False)),
        training=Training(lr=2.0, steps=1),
        privacy=privacy,
    )
    masked = replace(plain, secagg=SA1)
    work = Heard(make(plain, recipe(), holdings(), Memory()))
    one, other = engine(plain, work).play(), engine(masked, work).play()
    assert (flat(one) - flat(other)).abs().max() < 1e-6  # of numbers of about 1, in float32
    assert flat(one).abs().max() > 0.1
    assert len(work.answers) == 16  # four sites, four rounds: nobody was asked anew
    assert [receipt.metrics for receipt in other.receipts] == [{}] * 4
    own = engine(masked, make(masked, recipe(), holdings(), Memory())).play()
    assert own.candidate is not None  # and by itself it plays to its end


def test_masked_runs_have_the_same_bits() -> None:
    _, masked = both(FedAvg())
    assert torch.equal(flat(engine(masked).play()), flat(engine(masked).play()))


def test_stacks_of_sites_are_masked_one_by_one() -> None:
    _, masked = both(FedAvg())
    work: Executor = Vectorised(masked, recipe(), holdings())
    one, other = engine(masked).play(), engine(masked, work).play()
    assert (flat(one) - flat(other)).abs().max() < 1e-6


def test_a_site_that_is_late_is_left_out_and_its_masks_are_taken_off() -> None:
    plain, masked = both(FedAvg(), rounds=2)
    outcomes = []
    for each in (plain, masked):
        late = engine(each)
        late.world = Late(lambda task: 61.0 if task.site == LAST else 1.0)
        outcomes.append(late.play())
    one, other = outcomes
    assert (flat(one) - flat(other)).abs().max() < 1e-6
    assert [r.missing for r in other.receipts] == [{LAST: "no answer within 60 s"}] * 3


def test_too_few_in_time_fail_the_run_and_nothing_is_revealed() -> None:
    _, masked = both(FedAvg(), attempts=2)
    late = engine(masked)
    late.world = Late(lambda task: 61.0 if task.site != LAST else 1.0)
    outcome = late.play()
    assert outcome.end.state == "failed"
    assert [receipt.attempt for receipt in outcome.receipts] == [1, 2]
    assert not any(receipt.counted for receipt in outcome.receipts)


def test_metrics_are_means_over_the_sites_and_others_stay_at_home() -> None:
    _, masked = both(FedAvg())
    first = engine(masked).play().receipts[0]
    assert first.metrics.keys() <= {"loss", "clipped"}
    assert first.metrics["clipped"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"strategy": FedAvg(reducer=Median())}, "secagg with reducer Median, which looks at"),
        ({"strategy": QFedAvg()}, "secagg with strategy QFedAvg, whose sites report what they"),
        ({"cohort": replace(plan().cohort, quorum=2)}, "cohort.quorum 2 with secagg: of a sum of"),
        ({"secagg": replace(SA1, scores=())}, "evaluation with secagg and no secagg.scores"),
        ({"gates": (Gate(metric="auc", at_least=0.5),)}, "gates on auc with secagg: name them in"),
        ({"wire": Wire(up="zstd")}, "wire.up zstd with secagg: masked words cannot be packed"),
    ],
    ids=["reducer", "strategy", "cohort", "scores", "gate", "wire"],
)
def test_a_plan_that_secagg_contradicts_is_refused(change: dict[str, object], reason: str) -> None:
    _, masked = both(FedAvg())
    with pytest.raises(Contradiction, match=reason):
        replace(masked, **change)  # type: ignore[arg-type]


def test_all_contradictions_are_told_at_once() -> None:
    _, masked = both(FedAvg())
    cohort = replace(masked.cohort, quorum=2)
    with pytest.raises(Contradiction) as caught:
        replace(masked, strategy=QFedAvg(reducer=Median()), cohort=cohort, secagg=Secagg("sa1"))
    assert len([reason for reason in caught.value.reasons if "secagg" in reason]) == 4


def test_a_masked_plan_without_evaluation_needs_no_scores() -> None:
    _, masked = both(FedAvg(), evaluation=Evaluation(at_end=False))
    replace(masked, secagg=Secagg("sa1", clip=4.0, weight_cap=500.0))


def test_a_plan_with_secagg_survives_json() -> None:
    _, masked = both(FedAvg())
    assert Plan.from_json(masked.to_json()) == masked


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"clip": 0.0}, {"weight_cap": -1.0}, {"metrics": {"loss": 0.0}}):
        with pytest.raises(ConfigError, match="must be above 0"):
            Secagg("sa1", **wrong)
    with pytest.raises(ConfigError, match="use 'none' or 'sa1'"):
        Secagg("sa2")  # type: ignore[arg-type]
