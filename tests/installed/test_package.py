"""A package that pip installed adds one of each, and ours is not touched for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedml.cli.simulate import simulate
from fedml.coordinator.folder import Folder
from fedml.errors import ConfigError
from fedml.installed import GROUPS
from fedml.rounds import Plan
from tests.installed.packages import OFFERED, build, install
from tests.system.page import ROOT

SIMULATE = ("rounds=2", "tracking=none", "population.sites=4", "hydra.run.dir=out")
ALL = ("strategy=tiny", "strategy.factor=0.25", "strategy/reducer=middle", "cohort.quorum=3",
       "strategy.reducer.f=1", "executor=backwards", "executor.said=last first",
       "recipe.name=tiny_cancer")  # fmt: skip
JUDGE = """
import sys
from pathlib import Path
from fedml.errors import ConfigError
from fedml.rounds import Plan
try:
    Plan.from_json(Path('out/plan.json').read_text())
except ConfigError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    build(source / "project")
    install(source / "project", target)
    return target


@pytest.fixture
def here(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, on a machine where the package is installed."""
    monkeypatch.syspath_prepend(str(target))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def elsewhere(folder: Path, *words: str, target: Path | None = None) -> str:
    """What a Python of another machine prints, or complains of."""
    path = os.pathsep.join([*([str(target)] if target else []), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": path, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    return done.stdout + done.stderr


def model(*words: str) -> str:
    assert simulate([*SIMULATE, *words]) == 0
    return str(json.loads(Path("out", "summary.json").read_text())["model"])


def test_the_package_under_test_has_one_of_each() -> None:
    assert OFFERED.keys() == set(GROUPS.values())


@pytest.mark.timeout(300)
def test_a_simulation_uses_all_of_it_and_only_those_who_have_it_read_its_plan(
    target: Path, tmp_path: Path
) -> None:
    told = elsewhere(tmp_path, "-m", "fedml", "simulate", *SIMULATE, *ALL, target=target)
    assert "last first: 4 tasks" in told
    assert "done: candidate after 2 rounds" in told
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    strategy, digest = plan["strategy"], plan["strategy"]["digest"]
    assert (strategy["name"], strategy["factor"], len(digest)) == ("tiny", 0.25, 64)
    reducer = {"name": "middle", "digest": digest, "f": 1, "before": [], "clip": 10.0}
    assert strategy["reducer"] == reducer
    assert plan["recipe"]["name"] == "tiny_cancer"

    assert elsewhere(tmp_path, "-c", JUDGE, target=target) == ""
    without = elsewhere(tmp_path, "-c", JUDGE)
    assert without.startswith("plan.strategy: strategy 'tiny' is not installed; there are ")
    assert without.count("\n") == 1


def test_another_version_of_its_source_is_not_what_a_plan_means(
    here: Path, target: Path, tmp_path: Path
) -> None:
    model("strategy=tiny")
    source = target / "tiny" / "algorithms.py"
    text = source.read_text()
    try:
        source.write_text(text + "# another version\n")
        told = elsewhere(tmp_path, "-c", JUDGE, target=target)
    finally:
        source.write_text(text)
    assert "strategy tiny: here is" in told
    assert "install or allow that very source" in told


def test_its_statistic_and_its_rule_are_followed(here: Path) -> None:
    plain, whole = model("strategy=fedavg"), model("strategy=tiny", "strategy.factor=1.0")
    half, tilted = model("strategy=tiny"), model("strategy=tiny", "strategy.tilts=true")
    assert whole == plain  # a gradient times one is the gradient
    assert len({plain, half, tilted}) == 3


def test_the_plan_knows_its_statistic_for_what_it_is(here: Path) -> None:
    words = ("strategy=tiny", "strategy.tilts=true", "privacy=record", "privacy.epsilon=3")
    with pytest.raises(ConfigError, match="its sites report exact numbers"):
        simulate([*SIMULATE, *words])
    model("strategy=tiny")
    assert Plan.from_json(Path("out/plan.json").read_text())


def test_a_coordinator_keeps_its_versions_there(here: Path) -> None:
    from fedml.coordinator.folder import create
    from fedml.coordinator.settings import Settings

    create(here / "hub", Settings(registry="tiny:a place"))
    registry = Folder.open(here / "hub").registry()
    assert (type(registry).__name__, registry.next_version("any")) == ("Shelves", 1)
    assert registry.place == "a place"  # type: ignore[attr-defined]
