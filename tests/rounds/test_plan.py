"""A plan that contradicts itself cannot be built; one that stands reads back as it was."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest

from fedml.errors import ConfigError, Contradiction
from fedml.protocol.messages import Privacy, SiteId, Training
from fedml.protocol.secagg import Secagg
from fedml.rounds import Cohort, Evaluation, Gate, Plan, Wire
from fedml.strategies import (
    FedAvg,
    FedProx,
    Reducer,
    Scaffold,
    Strategy,
    WeightedMean,
    XGBoost,
    catalogue,
)
from fedml.strategies.robust import Bulyan, Krum, Median, Robust
from tests.rounds.worlds import plan

RECORD = Privacy("record", epsilon=3.0, delta=1e-5, rounds=3, evaluation_epsilon=0.5)


SHARED: dict[str, object] = {
    "privacy": replace(RECORD, mode="record_distributed", sharers=3),
    "cohort": Cohort(quorum=3, deadline=1),
    "training": Training(lr=1, steps=1),
    "strategy": FedAvg(),
}


def reasons(**changes: object) -> tuple[str, ...]:
    with pytest.raises(Contradiction) as caught:
        plan(**changes)
    return caught.value.reasons


def test_a_plan_whose_sites_share_the_noise_is_served_under_masks_alone() -> None:
    shared = plan(**SHARED)
    assert Plan.from_json(shared.to_json()) == shared
    with pytest.raises(Contradiction, match="without secure aggregation a coordinator sees it"):
        shared.check_served()
    plan(**SHARED, secagg=Secagg("sa1", weight_cap=100.0)).check_served()
    plan(privacy=RECORD).check_served()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cohort": Cohort(quorum=3, deadline=1, size=2)}, "quorum 3 is above cohort.size 2"),
        (
            {"cohort": Cohort(quorum=2, deadline=1, sites=(SiteId("bern"),))},
            "quorum 2 is above the 1 sites listed",
        ),
        (
            {"cohort": Cohort(quorum=1, deadline=1, size=2, sites=(SiteId("bern"),))},
            "size 2 is above the 1 sites listed",
        ),
        (
            {"cohort": Cohort(quorum=1, deadline=1, sites=(SiteId("a"), SiteId("a")))},
            "lists a more than once",
        ),
        ({"cohort": Cohort(quorum=0, deadline=1)}, "at least one site must answer"),
        ({"cohort": Cohort(quorum=1, deadline=0)}, "give the seconds a round may take"),
        ({"cohort": Cohort(quorum=1, deadline=float("inf"))}, "give the seconds a round may take"),
        ({"rounds": 0}, "rounds 0: set it to 1 or more"),
        ({"attempts": 0}, "attempts 0: set it to 1 or more"),
        ({"patience": float("nan")}, "patience nan"),
        ({"seed": -1}, "seed -1"),
        ({"parent": -1}, "parent -1: give a version of line"),
        ({"model": "No Name"}, "model 'No Name'"),
        ({"dataset": ""}, "dataset ''"),
        ({"privacy": RECORD, "rounds": 4}, "privacy.rounds 3 is not rounds 4"),
        (
            {"privacy": RECORD, "training": Training(lr=1, epochs=1)},
            "set training.steps instead",
        ),
        (
            {
                "privacy": Privacy("record", epsilon=1, delta=1e-5, rounds=3),
                "evaluation": Evaluation(every=1, at_end=False),
            },
            "set evaluation_epsilon above 0",
        ),
        ({**SHARED, "cohort": Cohort(quorum=2, deadline=1)}, "sharers 3 is above cohort.quorum 2"),
        ({**SHARED, "training": Training(lr=1, steps=2)}, "set steps=1 and batch_size=0"),
        (
            {**SHARED, "training": Training(lr=1, steps=1, batch_size=8)},
            "set steps=1 and batch_size=0",
        ),
        ({**SHARED, "strategy": FedAvg(reducer=Median())}, "nothing but their sum may be looked"),
        ({**SHARED, "strategy": FedProx()}, "strategy FedProx in mode record_distributed"),
        (
            {"strategy": XGBoost(), "wire": Wire(down="bf16+zstd")},
            "wire.down bf16+zstd with strategy XGBoost",
        ),
        ({**SHARED, "wire": Wire(up="bf16+zstd")}, "wire.up bf16+zstd with record_distributed"),
        (
            {**SHARED, "secagg": Secagg("sa1", colluders=1)},
            "sharers 3 is above cohort.quorum 3 less secagg.colluders 1",
        ),
        (
            {
                **SHARED,
                "secagg": Secagg("sa1"),
                "training": Training(lr=1, steps=1, weight_decay=0.1),
            },
            "training.weight_decay 0.1 with secagg in mode record_distributed",
        ),
        (
            {**SHARED, "secagg": Secagg("sa1", weight_cap=1e9)},
            "secagg.weight_cap 1e+09 at 3 sites: sums of up to",
        ),
        ({"gates": (Gate(metric="auc", at_least=0.9),)}, "gates on auc without a last evaluation"),
        ({"evaluation": Evaluation(every=-1)}, "evaluation.every -1"),
    ],
)
def test_each_contradiction_has_a_sentence_with_the_way_out(
    changes: dict[str, object], reason: str
) -> None:
    [found] = reasons(**changes)
    assert reason in found
    assert "\n" not in found


def drawn(size: int, *sites: str) -> Cohort:
    return Cohort(quorum=1, deadline=60, size=size, sites=tuple(map(SiteId, sites)))


@pytest.mark.parametrize(
    ("strategy", "cohort", "reason"),
    [
        (Scaffold(), drawn(2), "Scaffold with cohort.size 2 and strategy.sites 0: it must know"),
        (Scaffold(), drawn(2, "a", "b", "c"), "set strategy.sites to the number of them all"),
        (Scaffold(sites=2), drawn(0, "a", "b", "c"), "sites 2 is below the 3 that the cohort"),
    ],
)
def test_an_algorithm_that_counts_on_all_sites_must_know_how_many(
    strategy: Strategy, cohort: Cohort, reason: str
) -> None:
    [found] = reasons(strategy=strategy, cohort=cohort)
    assert reason in found


@pytest.mark.parametrize(
    ("sites", "cohort"), [(0, drawn(0)), (0, drawn(2, "a", "b")), (9, drawn(2)), (3, drawn(0))]
)
def test_an_algorithm_that_knows_how_many_sites_there_are_stands(
    sites: int, cohort: Cohort
) -> None:
    plan(strategy=Scaffold(sites=sites), cohort=cohort)


@dataclass(frozen=True)
class Bent(WeightedMean):
    """A reducer that is no mean."""

    @property
    def linear(self) -> bool:
        return False


@pytest.mark.parametrize("strategy", [Scaffold(reducer=Bent())])
def test_slots_that_only_a_mean_leaves_in_step_refuse_other_reducers(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(catalogue.REDUCERS.ours, "bent", Bent)
    [found] = reasons(strategy=strategy)
    name = type(strategy).__name__
    assert f"strategy {name} with reducer Bent: its sites report slots" in found
    assert "use reducer=weighted-mean, or strategy=fedavg" in found
    plan(strategy=FedAvg(reducer=Bent()))


@pytest.mark.parametrize(
    ("reducer", "least"),
    [(Median(f=2), 5), (Robust(f=2), 5), (Krum(f=2), 7), (Bulyan(f=2), 11)],
    ids=repr,
)
def test_a_quorum_below_what_a_robust_rule_needs_is_refused(reducer: Reducer, least: int) -> None:
    strategy = FedAvg(reducer=reducer)
    [found] = reasons(strategy=strategy, cohort=Cohort(quorum=least - 1, deadline=1))
    kind = type(reducer).__name__
    assert f"quorum {least - 1} with reducer {kind}, which needs {least} updates" in found
    assert "raise the quorum, lower strategy.reducer.f, or choose" in found
    plan(strategy=strategy, cohort=Cohort(quorum=least, deadline=1))


def test_all_contradictions_come_at_once() -> None:
    found = reasons(rounds=0, attempts=0, cohort=Cohort(quorum=5, deadline=-1, size=2), model="?")
    assert len(found) == 5


def test_a_sound_private_plan_stands() -> None:
    plan(privacy=RECORD, evaluation=Evaluation(every=1))


def test_a_gate_needs_a_bound() -> None:
    with pytest.raises(ConfigError, match="set at_least or at_most"):
        Gate(metric="auc")


@pytest.mark.parametrize(
    ("gate", "objection"),
    [
        (Gate(metric="auc", at_least=0.9), ""),
        (Gate(metric="auc", at_least=0.95), "gate auc: 0.91 is below 0.95"),
        (Gate(metric="auc", at_most=0.5), "gate auc: 0.91 is above 0.5"),
        (Gate(metric="f1", at_least=0.5), "gate f1: not measured, there are ['auc']"),
    ],
)
def test_a_gate_says_why_not(gate: Gate, objection: str) -> None:
    assert gate.objection({"auc": 0.91}) == objection


def test_a_score_that_is_no_number_passes_no_gate() -> None:
    assert Gate(metric="auc", at_least=0.5).objection({"auc": float("nan")})


FULL = plan(
    strategy=FedProx(mu=0.25),
    cohort=Cohort(quorum=1, deadline=60, sites=(SiteId("bern"), SiteId("kyoto")), size=1),
    evaluation=Evaluation(every=2),
    gates=(Gate(metric="auc", at_least=0.9), Gate(metric="loss", at_most=1)),
    privacy=RECORD,
    seed=7,
    parent=4,
)


def test_a_plan_reads_back_as_it_was() -> None:
    again = Plan.from_json(FULL.to_json())
    assert again == FULL
    assert again.to_json() == FULL.to_json()
    assert again.digest() == FULL.digest()


def test_equal_plans_have_equal_digests_and_others_do_not() -> None:
    whole, real = Cohort(quorum=1, deadline=60), Cohort(quorum=1, deadline=60.0)
    assert plan(cohort=whole).digest() == plan(cohort=real).digest()
    assert plan(seed=1).digest() != plan(seed=2).digest()


def test_a_strange_plan_is_refused_with_all_its_problems_in_one_line() -> None:
    raw = json.loads(FULL.to_json())
    raw["surprise"] = 1
    raw["rounds"] = "many"
    raw["strategy"] = {"name": "os.system"}
    raw["training"]["lr"] = -1
    del raw["cohort"]["quorum"]
    with pytest.raises(ConfigError) as caught:
        Plan.from_json(json.dumps(raw))
    text = str(caught.value)
    for part in (
        "plan.surprise is unknown",
        "plan.rounds 'many'",
        "'os.system' is not installed",
        "training.lr -1",
        "plan.cohort.quorum is missing",
    ):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", b"\xff", "[" * 100_000])
def test_what_is_no_plan_is_refused(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match="plan"):
        Plan.from_json(text)


def test_task_seeds_differ_by_round_and_site_and_fit_an_int64() -> None:
    seeds = {plan().task_seed(n, SiteId(s)) for n in range(1, 9) for s in ("bern", "kyoto")}
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert plan().task_seed(1, SiteId("bern")) == plan().task_seed(1, SiteId("bern"))
