"""Flower's strategies over our grid come to what they come to by hand, to the last bit."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid, strategy
from flwr.serverapp.strategy import Result, Strategy

from fedml.flower.grid import SimulatedGrid
from tests.flower.apps import FIRST, scored, stock_app, trained

ROOT = Path(__file__).parents[2]
SITES, ROUNDS = 9, 3


@dataclass(frozen=True)
class Case:
    """A strategy, the mods its sites need, and what it starts from."""

    make: Callable[[], Strategy]
    mods: list[Mod] = field(default_factory=list)
    first: list[np.ndarray] = field(default_factory=lambda: FIRST)
    grown: bool = False  # the model is trees


def trees(count: int) -> np.ndarray:
    model = {
        "gbtree_model_param": {"num_trees": str(count), "num_parallel_tree": "1"},
        "iteration_indptr": list(range(count + 1)),
        "trees": [{"id": k, "weight": k} for k in range(count)],
        "tree_info": [0] * count,
    }
    text = json.dumps({"learner": {"gradient_booster": {"model": model}}})
    return np.frombuffer(text.encode(), np.uint8)


def private(kind: Callable[..., Strategy], clip: float, mods: list[Mod] | None = None) -> Case:
    return Case(
        lambda: kind(strategy.FedAvg(), 0.5, num_sampled_clients=SITES, **{_name(kind): clip}),
        mods or [],
    )


def _name(kind: object) -> str:
    return "clipping_norm" if "Fixed" in str(kind) else "initial_clipping_norm"


CASES: dict[str, Case] = {
    "Bulyan": Case(lambda: strategy.Bulyan(num_malicious_nodes=1)),
    "FedAdagrad": Case(strategy.FedAdagrad),
    "FedAdam": Case(strategy.FedAdam),
    "FedAvg": Case(lambda: strategy.FedAvg(fraction_train=0.6, fraction_evaluate=0.5)),
    "FedAvgM": Case(lambda: strategy.FedAvgM(server_momentum=0.9)),
    "FedMedian": Case(strategy.FedMedian),
    "FedProx": Case(lambda: strategy.FedProx(proximal_mu=0.1)),
    "FedTrimmedAvg": Case(strategy.FedTrimmedAvg),
    "FedXgbBagging": Case(strategy.FedXgbBagging, first=[trees(2)], grown=True),
    "FedXgbCyclic": Case(strategy.FedXgbCyclic, first=[trees(2)], grown=True),
    "FedYogi": Case(strategy.FedYogi),
    "Krum": Case(lambda: strategy.Krum(num_malicious_nodes=2)),
    "MultiKrum": Case(lambda: strategy.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=4)),
    "QFedAvg": Case(lambda: strategy.QFedAvg(client_learning_rate=0.1, q=0.2)),
    "DifferentialPrivacyServerSideFixedClipping": private(
        strategy.DifferentialPrivacyServerSideFixedClipping, 0.3
    ),
    "DifferentialPrivacyClientSideFixedClipping": private(
        strategy.DifferentialPrivacyClientSideFixedClipping, 0.3, [fixedclipping_mod]
    ),
    "DifferentialPrivacyServerSideAdaptiveClipping": private(
        strategy.DifferentialPrivacyServerSideAdaptiveClipping, 0.1
    ),
    "DifferentialPrivacyClientSideAdaptiveClipping": private(
        strategy.DifferentialPrivacyClientSideAdaptiveClipping, 0.1, [adaptiveclipping_mod]
    ),
}


def answered(case: Case, message: Message) -> Message:
    """Return a site's reply, made by hand: no ClientApp, no grid."""
    site = message.metadata.dst_node_id - 1000
    arrays = message.content.array_records["arrays"]

    def act(message: Message, context: Context) -> Message:
        if case.grown:
            figures = MetricRecord({"num-examples": 10 + site})
            model = ArrayRecord([trees(3 + site)])
            kinds = {"arrays": model} if message.metadata.message_type == "train" else {}
            return Message(RecordDict({**kinds, "metrics": figures}), reply_to=message)
        make = trained if message.metadata.message_type == "train" else scored
        return Message(make(arrays, site), reply_to=message)

    context = Context(1, 1000 + site, {}, RecordDict(), {})
    if message.metadata.message_type == "train":
        for mod in case.mods:
            return mod(message, context, act)
    return act(message, context)


def app_of(case: Case) -> ClientApp:
    """Return the ClientApp that answers as `answered` does."""
    if not case.grown:
        return stock_app(case.mods)
    app = ClientApp()
    app.train()(lambda message, context: answered(case, message))
    app.evaluate()(lambda message, context: answered(case, message))
    return app


def by_hand(case: Case, grid: Grid) -> Result:
    """Drive the strategy's own methods; `grid` only says who is there."""
    flower, result = case.make(), Result()
    arrays, train, evaluate = ArrayRecord(case.first), ConfigRecord(), ConfigRecord()
    for round_ in range(1, ROUNDS + 1):
        asked = flower.configure_train(round_, arrays, train, grid)
        made, metrics = flower.aggregate_train(round_, [answered(case, m) for m in asked])
        assert made is not None
        assert metrics is not None
        result.arrays = arrays = made
        result.train_metrics_clientapp[round_] = metrics
        asked = flower.configure_evaluate(round_, arrays, evaluate, grid)
        told = flower.aggregate_evaluate(round_, [answered(case, m) for m in asked])
        assert told is not None
        result.evaluate_metrics_clientapp[round_] = told
    return result


def sow() -> None:
    """Begin the streams that strategies draw sites and noise from."""
    random.seed(7)
    np.random.seed(7)


def bits(arrays: ArrayRecord) -> dict[str, tuple[str, bytes]]:
    return {name: (array.dtype, array.data) for name, array in arrays.items()}


def test_every_strategy_of_flower_is_tried() -> None:
    assert set(CASES) == set(strategy.__all__) - {"Result", "Strategy"}


@pytest.mark.parametrize("name", CASES)
def test_a_strategy_over_our_grid_comes_to_what_it_does_by_hand(name: str) -> None:
    case = CASES[name]
    sow()
    expected = by_hand(case, SimulatedGrid(app_of(case), SITES, patience=math.inf))
    sow()
    grid = SimulatedGrid(app_of(case), SITES)
    found = case.make().start(grid, ArrayRecord(case.first), num_rounds=ROUNDS)
    assert bits(found.arrays) == bits(expected.arrays)
    assert bits(found.arrays) != bits(ArrayRecord(case.first))
    assert found.train_metrics_clientapp == expected.train_metrics_clientapp
    assert found.evaluate_metrics_clientapp == expected.evaluate_metrics_clientapp
    assert sorted(found.train_metrics_clientapp) == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_flowers_own_runtime_comes_to_the_same(tmp_path: Path) -> None:
    file = tmp_path / "theirs.npz"
    words = [sys.executable, "-m", "tests.flower.under_flower", str(file), "4", "3"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = np.load(file)
    ours = strategy.FedAvg().start(SimulatedGrid(stock_app(), 4), ArrayRecord(FIRST), num_rounds=3)
    # Flower's replies come in any order, and float addition notices
    for name, array in zip(("first", "second"), ours.arrays.to_numpy_ndarrays(), strict=True):
        np.testing.assert_allclose(array, theirs[name], rtol=1e-6, atol=1e-6)
    losses = [metrics["eval_loss"] for metrics in ours.evaluate_metrics_clientapp.values()]
    np.testing.assert_allclose(losses, theirs["losses"], rtol=1e-6)
