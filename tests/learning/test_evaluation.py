from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from fedml.errors import ConfigError, Refused, TaskFailed
from fedml.learning.evaluation import evaluate, mean_scores
from fedml.learning.recipe import Rows
from fedml.params import Params
from fedml.protocol.messages import Privacy, RunId, SiteId, TaskId
from fedml.protocol.tasks import Brief, Report, Task
from fedml.recipes.breast_cancer import BreastCancer

torch.set_num_threads(1)

RECIPE = BreastCancer()
PARAMS = Params(RECIPE.build().state_dict())
TASK = Task(TaskId("t"), RunId("r"), 3, SiteId("north"), "evaluate", Brief(PARAMS))


def some_rows(count: int) -> Rows:
    return Rows(RECIPE.example(count), torch.arange(count) % 4 // 3)  # a zero model says 0


def report(total: float, count: float, name: str = "accuracy") -> Report:
    return Report(TaskId("t"), 1, SiteId("s"), {name: total}, count)


def test_totals_are_sums_over_rows_and_rows_are_counted() -> None:
    made = evaluate(RECIPE, TASK, some_rows(5000), Privacy())
    assert made == Report(TASK.id, 3, TASK.site, {"accuracy": 3750.0}, 5000.0)


def test_no_score_leaves_under_privacy_unless_it_was_paid_for() -> None:
    asked = Privacy("record", 3.0, 1e-5)
    with pytest.raises(Refused, match=r"no scores leave.*privacy\.evaluation_epsilon"):
        evaluate(RECIPE, TASK, some_rows(8), asked)


def test_scores_under_privacy_are_noisy_and_near() -> None:
    asked = Privacy("record", 3.0, 1e-5, evaluation_epsilon=1.0)
    made = [evaluate(RECIPE, TASK, some_rows(400), asked) for _ in range(20)]
    assert len({m.totals["accuracy"] for m in made}) > 5 and len({m.count for m in made}) > 3
    assert mean_scores(made)["accuracy"] == pytest.approx(0.75, abs=0.02)


def test_a_count_alone_leaves_for_an_empty_part() -> None:
    asked = Privacy("record", 3.0, 1e-5, evaluation_epsilon=1.0)
    empty = Rows(torch.zeros(0, 30), torch.zeros(0).long())
    assert evaluate(RECIPE, TASK, empty, asked).totals.keys() == {"accuracy"}
    assert evaluate(RECIPE, TASK, empty, Privacy()).count == 0


class Odd(BreastCancer):
    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        return {"rank": output[:, 0] + 2}


class Batchwise(BreastCancer):
    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        return {"share": (output * 0)[:, 0] + 1.0 / len(output)}


def test_a_score_outside_its_range_is_refused_in_the_open() -> None:
    with pytest.raises(ConfigError, match=r"score 'rank' of row 0 is 2\.0"):
        evaluate(Odd(), TASK, some_rows(3), Privacy())


def test_under_privacy_a_row_is_scored_by_itself() -> None:
    """A score that looks at its whole batch would let one row move all the others'."""
    asked = Privacy("record", 3.0, 1e-5, evaluation_epsilon=1e6)
    made = evaluate(Batchwise(), TASK, some_rows(100), asked)
    assert made.totals["share"] == pytest.approx(100, abs=0.1)


def test_rows_that_do_not_fit_fail_the_task() -> None:
    with pytest.raises(TaskFailed, match="task t"):
        evaluate(RECIPE, TASK, Rows(torch.zeros(2, 7), torch.zeros(2).long()), Privacy())


def test_means_weigh_sites_by_rows_and_do_not_notice_order() -> None:
    reports = [report(0.1, 3), report(7, 10), report(1e16, 1e17), report(0.3, 1)]
    assert mean_scores([report(1, 10), report(30, 30)]) == {"accuracy": 31 / 40}
    assert mean_scores(reports) == mean_scores(reports[::-1])
    assert mean_scores([]) == {}


def test_a_score_that_one_site_lacks_is_averaged_over_the_others() -> None:
    means = mean_scores([report(5, 10), report(9, 10, "recall")])
    assert means == {"accuracy": 0.5, "recall": 0.9}


@pytest.mark.parametrize(("total", "count"), [(-3.0, 5.0), (3.0, -5.0), (9.0, 4.0), (0.0, 0.0)])
def test_noise_cannot_push_a_mean_out_of_its_range(total: float, count: float) -> None:
    assert 0 <= mean_scores([report(total, count)])["accuracy"] <= 1
