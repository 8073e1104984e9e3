"""A site's folder: what the policy names is there, what must not be lost is whole."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from fedml import durable
from fedml.codebase import keep
from fedml.doctor.site import judge_rows
from fedml.errors import BudgetExhausted, ConfigError
from fedml.privacy.accounting import evaluation_event
from fedml.privacy.ledger import Ledger, Limits
from fedml.protocol.messages import Privacy, RunId, TaskId
from fedml.site.departure import leave
from fedml.site.policy import AllowedApp, AllowedRecipe, Dataset, add_app, extend, read_policy
from fedml.site.settings import read_settings
from tests.doctor.ward import RECIPE, admit, allow, bad, found, print_of
from tests.transport.world import GrpcPlace, World

EVENT = evaluation_event(Privacy("record", 1.0, 1e-5, rounds=1, evaluation_epsilon=0.5))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[GrpcPlace]:
    place = GrpcPlace(World.build(tmp_path / "hub"))
    await place.start()
    yield place
    await place.stop()


@pytest.fixture
def site(place: GrpcPlace, tmp_path: Path) -> Path:
    return admit(tmp_path / "mercy", place.world.credentials())


def ledger(site: Path) -> Ledger:
    path = site / "ledger" / "records.jsonl"
    return Ledger(path, name="records", limits=Limits(3.0, 1e-5))


def spend(site: Path, *tasks: str) -> None:
    with closing(ledger(site)) as own:
        for task in tasks:
            own.reserve(TaskId(task), RunId("run-1"), "train", EVENT)
            own.charge(TaskId(task))


async def test_a_good_site_is_well_and_nothing_is_touched(site: Path) -> None:
    allow(site)
    spend(site, "a")
    before = print_of(site)
    findings = await found(site)
    assert bad(findings) == {}
    assert findings["data records"].found == "train: 12 rows"
    assert "epsilon 0.500 of 3 spent" in findings["ledger records"].found
    assert findings["program"].state == "warn"
    assert print_of(site) == before


async def test_a_site_at_work_is_looked_at_and_let_be(site: Path) -> None:
    with durable.lock(site, "a site daemon"):
        own = ledger(site)
        before = print_of(site)
        findings = await found(site)
        assert print_of(site) == before
        own.reserve(TaskId("a"), RunId("run-1"), "train", EVENT)
        own.close()
    assert findings["program"].found.startswith("a site daemon (process ")
    assert bad(findings) == {}


async def test_a_recipe_with_another_digest(site: Path) -> None:
    allow(site, digest="0" * 64)
    line = bad(await found(site))["recipe breast_cancer"]
    assert "the policy allows 000000000000…, installed is" in line
    assert f'write digest = "{RECIPE.digest}"' in line


async def test_a_recipe_that_is_not_installed(site: Path) -> None:
    allow(site, name="poetry")
    assert "is not installed" in bad(await found(site))["recipe poetry"]


async def test_a_data_file_that_is_gone(site: Path) -> None:
    path = allow(site)
    path.unlink()
    assert f"{path}: No such file or directory" in bad(await found(site))["data records"]


async def test_a_data_file_that_its_recipe_cannot_read(site: Path) -> None:
    path = allow(site)
    path.write_text(path.read_text() + "1,2,three\n")
    assert str(path) in bad(await found(site))["data records"]


async def test_a_data_file_without_rows(site: Path) -> None:
    path = allow(site)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    assert "data records" in bad(await found(site))


def test_rows_are_held_against_the_statement(tmp_path: Path) -> None:
    stated = Dataset(tmp_path, 100, (), epsilon=1.0)
    states = {n: judge_rows(stated, "records", "train", n).state for n in (0, 49, 50, 200, 201)}
    assert states == {0: "fail", 49: "warn", 50: "ok", 200: "ok", 201: "warn"}
    assert judge_rows(stated, "records", "held_out", 3).state == "ok"


RECIPE_OF_OUR_OWN = """
class Own:
    def read(self, path):
        print('{"dataset": "records", "part": "train", "rows": 999}')
        %s
"""


@pytest.mark.parametrize(
    ("deed", "word"),
    [
        ("import os; os._exit(3)", "ended with status 3"),
        ("raise KeyError('age')", "KeyError: 'age'"),
    ],
)
async def test_a_recipe_that_misbehaves_is_one_finding(site: Path, deed: str, word: str) -> None:
    from fedml.learning.recipe import identify

    (site / "own.py").write_text(RECIPE_OF_OUR_OWN % deed)
    digest = identify("own", {"own": f"{site / 'own.py'}:Own"}).digest
    dataset = Dataset(site / "own.py", 9, ("own",), epsilon=1.0)
    extend(site / "policy.toml", "own", AllowedRecipe(digest), "records", dataset)
    text = (site / "policy.toml").read_text()
    entry = f'digest = "{digest}"\n'
    (site / "policy.toml").write_text(text.replace(entry, f'{entry}file = "own.py:Own"\n'))
    findings = await found(site)
    assert any(word in line for line in bad(findings).values()), findings
    assert not any("999" in finding.found for finding in findings.values())


async def test_a_ledger_with_a_torn_end_is_told(site: Path) -> None:
    allow(site)
    spend(site, "a")
    path = site / "ledger" / "records.jsonl"
    path.write_bytes(path.read_bytes() + b"00000000 {")
    finding = (await found(site))["ledger records"]
    assert finding.state == "warn"
    assert "3 records, then 10 bytes of a torn one" in finding.found
    assert path.read_bytes().endswith(b"{")


async def test_a_ledger_put_back_from_a_backup(site: Path) -> None:
    allow(site)
    spend(site, "a")
    path = site / "ledger" / "records.jsonl"
    backup = path.read_bytes()
    spend(site, "b")
    path.write_bytes(backup)
    line = bad(await found(site))["ledger records"]
    assert "3 records, there were 5" in line
    assert "put no backup in its place" in line


async def test_a_damaged_ledger(site: Path) -> None:
    allow(site)
    spend(site, "a")
    path = site / "ledger" / "records.jsonl"
    path.write_bytes(path.read_bytes().replace(b"run-1", b"run-2", 1))
    assert "damaged at byte" in bad(await found(site))["ledger records"]


async def test_a_budget_that_is_spent(site: Path) -> None:
    allow(site)
    with pytest.raises(BudgetExhausted):
        spend(site, *map(str, range(100)))
    finding = (await found(site))["ledger records"]
    assert finding.state == "warn"
    assert "are refused, as the policy says" in finding.advice


async def test_a_clock_before_the_last_charge(site: Path) -> None:
    allow(site)
    spend(site, "a")
    line = bad(await found(site, lambda: time.time() - 200))["clock"]
    assert "the last record is " in line


async def test_a_shelf_that_leaves_no_room_for_a_round(site: Path) -> None:
    weights = site / "shelf" / "m" / "1" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    with weights.open("wb") as file:
        file.truncate(8 * 10**12)  # sparse: takes no room itself
    line = bad(await found(site))["disk"]
    assert "a round here takes 96000.0 GB" in line


@pytest.mark.parametrize("text", ["", "name = 1", "\x00", 'name = "mercy"'])
async def test_settings_that_do_not_read(site: Path, text: str) -> None:
    (site / "site.toml").write_text(text)
    assert "site.toml" in bad(await found(site))["settings"]


async def test_a_policy_that_does_not_read(site: Path) -> None:
    (site / "policy.toml").write_text("epsilon = 3")
    assert "policy.epsilon is unknown" in bad(await found(site))["policy"]


async def test_a_coordinator_that_is_away_is_all_that_is_wrong(
    site: Path, place: GrpcPlace
) -> None:
    await place.stop()
    assert bad(await found(site)).keys() == {"coordinator"}


async def test_a_site_that_has_left(site: Path, place: GrpcPlace) -> None:
    link = place.link()
    await leave(site, read_settings(site), link, time.time())
    await link.close()
    [finding] = (await found(site)).values()
    assert finding.state == "warn"
    assert "mercy left" in finding.found
    assert f"fedml site join TOKEN --dir {site}" in finding.advice


async def test_a_folder_that_is_none_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no site's folder, no coordinator's"):
        await found(tmp_path)
    (tmp_path / "identity").mkdir()
    with pytest.raises(ConfigError, match="joining broke off"):
        await found(tmp_path)


async def test_an_app_whose_copy_is_another_or_whose_data_wants_privacy_is_found(
    site: Path, tmp_path: Path
) -> None:
    allow(site)
    source, policy = tmp_path / "app", site / "policy.toml"
    (source / "deep").mkdir(parents=True)
    (source / "deep/app.py").write_text("app = 1")
    (site / "apps").mkdir()
    for name, datasets in (("ward", ()), ("nosy", ("records",))):
        copy, digest = keep(source, site / "apps", name)
        app = AllowedApp(digest, copy, "none", datasets, {"partition-id": 3, "text": 'a "b"'})
        add_app(policy, name, app)
    assert read_policy(policy).apps["ward"].node_config == {"partition-id": 3, "text": 'a "b"'}
    findings = await found(site)
    assert findings["app ward"].state == "ok"
    assert "dataset records, whose policy wants privacy" in bad(findings)["app nosy"]
    (site / "apps" / copy.name.replace("nosy", "ward") / "deep/app.py").write_text("app = 2")
    assert "the policy allows" in bad(await found(site))["app ward"]
    with pytest.raises(ConfigError, match=r"\[apps.ward\] is there already"):
        add_app(policy, "ward", app)
