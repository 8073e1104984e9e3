"""A simulation's MLflow run tells where its model comes from; a multirun's jobs are children."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from fedml.cli.simulate import simulate
from fedml.errors import ConfigError
from fedml.rounds import Plan
from fedml.simulation import results
from fedml.simulation.results import Entry
from fedml.simulation.tracking import Mlflow, Story, Untracked
from tests.simulation.worlds import chronicle, plan


@pytest.fixture
def place(tmp_path: Path) -> Mlflow:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    return Mlflow(uri, "fedml/breast_cancer", str(tmp_path / "artifacts"))


def play(a_plan: Plan) -> list[Entry]:
    engine, told = chronicle(a_plan)
    engine.play()
    return told.entries


def story(folder: Path, a_plan: Plan, found: Sequence[Entry]) -> Story:
    results.write(folder, a_plan, found, None)
    return Story(a_plan, {"rounds": 3, "cohort": {"quorum": 2}}, folder, "d" * 64)


def runs(place: Mlflow) -> list[Run]:
    client = MlflowClient(place.uri)
    found = client.get_experiment_by_name(place.experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id], order_by=["attributes.start_time"]))


def test_a_run_has_its_settings_curves_files_and_lineage(place: Mlflow, tmp_path: Path) -> None:
    a_plan, folder = plan(every=1), tmp_path / "out"
    found = play(a_plan)
    line = place.record(story(folder, a_plan, found), found, "FINISHED")
    (run,) = runs(place)
    assert run.info.run_id in line
    assert run.info.status == "FINISHED"
    assert run.data.params == {"rounds": "3", "cohort.quorum": "2"}
    tags = run.data.tags
    assert tags["fedml.plan"] == a_plan.digest()
    assert tags["fedml.recipe"].endswith(a_plan.recipe.digest)
    assert (tags["fedml.data"], len(tags["fedml.environment"])) == ("d" * 64, 64)
    client = MlflowClient(place.uri)
    scores = client.get_metric_history(run.info.run_id, "score/accuracy")
    expected = [e.receipt.scores["accuracy"] for e in found if e.receipt.scores]
    assert [(m.step, m.value) for m in scores] == [*enumerate(expected, 1)]
    files = {Path(file.path).name for file in client.list_artifacts(run.info.run_id)}
    assert files == {"results.parquet", "summary.json", "plan.json"}


def test_a_resumed_run_goes_on_in_its_record_and_repeats_nothing(
    place: Mlflow, tmp_path: Path
) -> None:
    a_plan = plan(every=1)
    found = play(a_plan)
    told = story(tmp_path / "out", a_plan, found)
    place.record(told, found[:3], "KILLED")
    assert runs(place)[0].info.status == "KILLED"
    place.record(told, found, "FINISHED")
    (run,) = runs(place)
    assert run.info.status == "FINISHED"
    history = MlflowClient(place.uri).get_metric_history(run.info.run_id, "loss")
    assert [metric.step for metric in history] == [1, 2, 3]


def test_a_multirun_is_a_parent_of_its_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    status = simulate([
        "-m", "tracking=mlflow", "strategy=fedavg,fedadam", "privacy=record",
        "privacy.epsilon=1,8", "rounds=1", "population.sites=2", "hydra.sweep.dir=many",
    ])  # fmt: skip
    assert status == 0
    parent, *children = runs(Mlflow(uri, "fedml/breast_cancer"))
    assert len(children) == 4
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert {run.data.params["privacy.epsilon"] for run in children} == {"1", "8"}
    assert parent.info.status == "FINISHED"
    client = MlflowClient(uri)
    files = {Path(file.path).name for file in client.list_artifacts(parent.info.run_id)}
    assert files >= {"sweep.parquet", "sweep.json", "privacy-utility.png"}


def test_a_database_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    a_plan = plan(rounds=1)
    found = play(a_plan)
    bad = Mlflow("oracle9i://nowhere", "x", str(tmp_path / "artifacts"))
    with pytest.raises(ConfigError, match="registry oracle9i://nowhere") as caught:
        bad.record(story(tmp_path / "out", a_plan, found), found, "FINISHED")
    assert "\n" not in str(caught.value)


def test_nothing_is_recorded_if_that_is_asked_for(tmp_path: Path) -> None:
    a_plan = plan(rounds=1)
    found = play(a_plan)
    assert Untracked().record(story(tmp_path, a_plan, found), found, "FINISHED") == ""
    assert Untracked().conclude(tmp_path, "FINISHED") == ""
