"""What is wrong with an offer is one line that names the package; all else goes on."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedml.cli.compose import compose_plan
from fedml.coordinator.allowance import allow_strategy
from fedml.coordinator.folder import Folder, create
from fedml.coordinator.settings import Settings
from fedml.errors import ConfigError, Corrupt
from fedml.installed import GROUPS, Table, digest_of
from fedml.learning.recipe import identify
from fedml.releases.registries import REGISTRIES, open_registry
from fedml.simulation.executors.catalogue import EXECUTORS
from fedml.strategies import (
    REDUCERS,
    RULES,
    STATISTICS,
    STRATEGIES,
    FedAvg,
    build,
    describe,
)
from tests.installed.packages import register

TABLES: tuple[Table[Any], ...] = (
    STRATEGIES, RULES, STATISTICS, REDUCERS, EXECUTORS, REGISTRIES,
)  # fmt: skip
IDS = [table.kind for table in TABLES]
BAD = "value = 3\ndef function(): ...\nclass Empty: ...\n"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path that packages may be put into."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_every_group_has_a_table() -> None:
    assert {GROUPS[table.kind] for table in TABLES} == {*GROUPS.values()} - {"fedml.recipes"}


@pytest.mark.parametrize("table", TABLES, ids=IDS)
def test_ours_all_load_and_are_what_they_say(table: Table[Any]) -> None:
    for name in table.ours:
        if name != "cluster":  # needs Ray
            assert table.find(name) == (table[name], "")
            assert table.origin(name) == "fedml"
    assert "nonsense" not in table
    assert table.get("nonsense") is None


@pytest.mark.parametrize("table", TABLES, ids=IDS)
def test_a_name_of_ours_is_not_taken(table: Table[Any], packages: Path) -> None:
    first, *others = table.ours
    register(packages, "thief", {GROUPS[table.kind]: {first: "somewhere:Else"}})
    told = rf"{table.kind} {first} of thief 1\.0 \(somewhere:Else\) has the name of one of ours"
    with pytest.raises(ConfigError, match=told):
        table[first]
    if others:
        assert table[others[-1]] is not None


@pytest.mark.parametrize("table", TABLES, ids=IDS)
def test_what_does_not_import_says_which_and_what_to_do(table: Table[Any], packages: Path) -> None:
    register(packages, "broken", {GROUPS[table.kind]: {"new": "no_such_module.x:Y"}})
    with pytest.raises(
        ConfigError,
        match=rf"{table.kind} new of broken 1\.0 \(no_such_module\.x:Y\) does not load: there is "
        r"no module no_such_module; mend or uninstall broken 1\.0",
    ):
        table["new"]
    assert table[next(iter(table.ours))] is not None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ValueError('at import\\nand more')", "does not load: at import; mend or"),
        ("import torch.nowhere", "does not load: No module named 'torch.nowhere'; mend or"),
        ("def x(:", "does not load: "),
        ("", "has no attribute 'Thing'; mend or uninstall faulty 1.0"),
    ],
)
def test_an_error_at_import_is_one_line(packages: Path, text: str, reason: str) -> None:
    name = f"faulty_{abs(hash(text))}"
    (packages / f"{name}.py").write_text(text)
    register(packages, "faulty", {"fedml.strategies": {"new": f"{name}:Thing"}})
    with pytest.raises(ConfigError) as caught:
        build({"name": "new"})
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", TABLES, ids=IDS)
@pytest.mark.parametrize("thing", ["value", "function", "Empty"])
def test_an_object_of_another_type_is_no_such_thing(
    table: Table[Any], thing: str, packages: Path
) -> None:
    (packages / "wrongly.py").write_text(BAD)
    sys.modules.pop("wrongly", None)
    register(packages, "wrong", {GROUPS[table.kind]: {"new": f"wrongly:{thing}"}})
    with pytest.raises(ConfigError, match=r"new of wrong 1\.0 .* is no \w+: .*wrong 1\.0"):
        table["new"]


def test_settings_whose_types_cannot_be_read_are_no_settings(packages: Path) -> None:
    (packages / "hinted.py").write_text(OWN.replace("pull: float", 'pull: "Nowhere"'))
    register(packages, "hints", {"fedml.strategies": {"hinted": "hinted:Own"}})
    with pytest.raises(ConfigError, match=r"of hints 1\.0 .* name 'Nowhere' is not defined; mend"):
        build({"name": "hinted"})


def test_a_statistic_and_a_rule_share_their_names(packages: Path) -> None:
    groups = {"fedml.statistics": {"plain": "a:B"}, "fedml.rules": {"newton": "a:B"}}
    register(packages, "thief", groups)
    for table, name in ((STATISTICS, "plain"), (RULES, "newton")):
        with pytest.raises(ConfigError, match="has the name of one of ours"):
            table[name]


def test_a_name_that_two_packages_offer_is_neither_s(packages: Path) -> None:
    for package in ("one", "two"):
        (packages / f"{package}_way.py").write_text(f"# {package}\n{OWN}")
        register(packages, package, {"fedml.strategies": {"both": f"{package}_way:Own"}})
    with pytest.raises(ConfigError, match=r"both.* is offered by one 1\.0 and by two"):
        build({"name": "both"})


OWN = """
from dataclasses import dataclass
from fedml.strategies import FedAvg

@dataclass(frozen=True)
class Own(FedAvg):
    pull: float = 1.0
"""


def test_a_file_of_one_s_own_is_named_by_its_digest(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    words = ["task=breast_cancer", "cohort.quorum=2", "cohort.deadline=9", "strategy=own"]
    plan = compose_plan("run", [*words, f"strategy.file={file}:Own", "+strategy.pull=0.5"])
    told = describe(plan.strategy)
    assert (told["name"], told["pull"]) == ("own", 0.5)
    assert told["digest"] == identify("x", {"x": f"{file}:Own"}).digest
    with pytest.raises(ConfigError, match=r"here is .* and 000000000000 is wanted"):
        build({**told, "digest": "0" * 64})
    with pytest.raises(ConfigError, match=r"strategy own: .*'push'"):
        compose_plan("run", [*words, f"strategy.file={file}:Own", "+strategy.push=0.5"])
    with pytest.raises(ConfigError, match="has the name of one of ours"):
        compose_plan("run", [*words, f"strategy.file={file}:Own", "strategy.name=fedavg"])


def test_our_choices_stay_ours(packages: Path) -> None:
    words = ["task=breast_cancer", "cohort.quorum=2", "cohort.deadline=9"]
    register(packages, "thief", {"fedml.strategies": {"fedavg": "a:B", "fedprox": "a:B"}})
    with pytest.raises(ConfigError, match=r"strategy fedavg of thief 1\.0 .* rename it"):
        compose_plan("run", [*words, "strategy=fedavg"])
    assert compose_plan("run", [*words, "strategy=fedadam"])


def test_a_class_that_nobody_offers_is_not_built(packages: Path) -> None:
    (packages / "quiet.py").write_text(OWN)
    words = ["task=breast_cancer", "cohort.quorum=2", "cohort.deadline=9"]
    with pytest.raises(ConfigError, match=r"only names below fedml\. are built"):
        compose_plan("run", [*words, "strategy=fedavg", "strategy._target_=quiet.Own"])


def test_a_class_that_a_package_offers_may_be_a_target(packages: Path) -> None:
    (packages / "quiet.py").write_text(OWN)
    words = ["task=breast_cancer", "cohort.quorum=2", "cohort.deadline=9"]
    register(packages, "loud", {"fedml.strategies": {"quiet": "quiet:Own"}})
    plan = compose_plan("run", [*words, "strategy=fedavg", "strategy._target_=quiet.Own"])
    assert describe(plan.strategy)["name"] == "quiet"


def test_an_unknown_registry_is_mlflow_s_business(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        open_registry("nowhere:place", tmp_path)


@dataclass(frozen=True)
class Named(FedAvg):
    """A strategy with a setting that a plan has other uses for."""

    digest: str = ""


def test_a_setting_called_as_a_plan_s_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="has a setting 'digest', which a plan needs"):
        STRATEGIES._take(Named)


def test_every_version_that_was_taken_in_stays_and_is_what_it_was(tmp_path: Path) -> None:
    hub, file = tmp_path / "hub", tmp_path / "stay.py"
    create(hub, Settings())
    Folder.open(hub)
    digests = []
    for step in ("1.0", "2.0"):
        file.write_text(OWN.replace("1.0", step).replace("Own", "Staying"))
        name, digest = allow_strategy(hub, f"{file}:Staying")
        assert (name, digest) == ("staying", digest_of(file.read_bytes()))
        digests.append(digest)
    file.unlink()  # the coordinator has its own
    built = [build({"name": "staying", "digest": digest}) for digest in digests]
    assert [describe(one)["pull"] for one in built] == [1.0, 2.0]
    assert [describe(one)["digest"] for one in built] == digests
    kept = hub / "strategies" / f"staying@Staying@{'0' * 64}.py"
    kept.write_text(OWN.replace("Own", "Staying"))
    with pytest.raises(Corrupt, match="its bytes are not those of its name"):
        build({"name": "staying", "digest": "0" * 64})


@pytest.mark.parametrize(
    ("target", "name", "line"),
    [
        ("nowhere.py:Own", "", "nowhere.py: No such file"),
        ("Own", "", "write file.py:Class"),
        ("mine.py:Own", "fedavg", "has the name of one of ours; give it another"),
        ("mine.py:Own", "a@b", "use 1-63 of a-z"),
        ("mine.py:Other", "", "has no attribute 'Other'; mend the file"),
        ("mine.py:OWN", "", "is no Strategy: it must be a frozen dataclass; mend the file"),
    ],
)
def test_what_is_no_strategy_is_not_taken_in(
    target: str, name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    create(tmp_path / "hub", Settings())
    Path("mine.py").write_text(f"{OWN}\nOWN = 3\n")
    with pytest.raises(ConfigError) as caught:
        allow_strategy(tmp_path / "hub", target, name)
    assert line in str(caught.value)
    assert not (tmp_path / "hub" / "strategies").exists()
