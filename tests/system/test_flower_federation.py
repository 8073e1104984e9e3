"""Flower apps on a coordinator and two sites over mTLS: real processes, and kill -9 among them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml.codebase import digest
from fedml.protocol.apps import AppPlan, Value
from fedml.protocol.messages import RecipeId, RunId
from tests.system.page import ROOT
from tests.system.town import Town, complaint, fedml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
QUICKSTART, WARD = ROOT / "tests/flower/quickstart", ROOT / "tests/flower/ward"


class Pair(Town):
    """A coordinator and two sites that run Flower apps, and have no dataset of ours."""

    def found(self) -> None:
        self.begin(grace=5.0)
        self.names = ["bern", "chur"]
        self.commands([self.joining(name, self.token(name)) for name in self.names])

    def allow(self, app: Path, *names: str, options: tuple[str, ...] = ()) -> None:
        self.command("coordinator", "allow-app", str(self.hub), str(app))
        for name in names:
            where = f"partition-id={self.names.index(name)} num-partitions=2"
            self.command(
                "site", "allow-app", str(self.site(name)), str(app),
                "--privacy", "none", "--node-config", where, *options,
            )  # fmt: skip

    def run(self, app: Path, name: str, marks: Path, least: int = 2, **settings: Value) -> RunId:
        """Submit a run of the app; what its sites mark is in `marks`."""
        marks.mkdir()
        words: dict[str, Value]
        words = {"rounds": 3, "timeout": 60.0, "hold": 0, "raise-at": 0, "marks": str(marks)}
        words |= {key.replace("_", "-"): value for key, value in settings.items()}
        plan = AppPlan(RecipeId(name, digest(app)), words, least)
        return self.ask(lambda c: c.submit(plan.to_json())).id

    def result(self, run: RunId) -> dict[str, dict[str, dict[str, float]]]:
        """Return what a run came to."""
        found: dict[str, dict[str, dict[str, float]]]
        found = json.loads((self.hub / "flower/runs" / run / "result.json").read_text())
        return found

    def until_marked(self, marks: Path, place: int, text: str) -> None:
        """Wait until a site has marked `text`."""
        path = marks / f"site-{place}"
        name = self.names[place]
        self.wait_for(name, lambda: path.exists() and text in path.read_text().splitlines())

    def open_all(self) -> None:
        for name in self.names:
            if not self.is_running(name):
                self.open(name)
        self.wait_for("coordinator", lambda: self.here() == set(self.names))


def lone(folder: Path) -> Path:
    """Write an app that is the ward's but for its name."""
    folder.mkdir()
    (folder / "ward_app.py").write_text((WARD / "ward_app.py").read_text())
    text = (WARD / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(text.replace('name = "ward"', 'name = "lone"'))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    a_pair = Pair(tmp_path_factory.mktemp("pair"))
    with a_pair:
        a_pair.found()
        a_pair.allow(QUICKSTART, *a_pair.names, options=("--seeded",))
        a_pair.allow(WARD, *a_pair.names)
        a_pair.allow(lone(a_pair.folder / "lone"), "bern")
        a_pair.open_all()
        yield a_pair


def test_the_template_comes_to_the_same_bits_as_in_simulation(pair: Pair, tmp_path: Path) -> None:
    settings = ("--run-config", "num-server-rounds=2", "--seed", "3", "--json")
    app, profile = str(QUICKSTART), pair.hub / "operator"
    there = fedml("flower", "run", app, "--federation", *settings, profile=profile)
    assert there.returncode == 0, there.stderr + pair.log("coordinator")
    folder = tmp_path / "here"
    here = fedml("flower", "run", app, "--sites", "2", "--folder", str(folder), *settings)
    ours, theirs = json.loads(there.stdout), json.loads(here.stdout)
    for part in ("train", "evaluate", "server"):
        assert ours[part] == theirs[part], part
    assert ours["train"].keys() == {"1", "2"}
    place = pair.hub / "flower/runs" / ours["run"]
    assert (place / ours["model"]).read_bytes() == (folder / theirs["model"]).read_bytes()


def test_a_coordinator_killed_in_the_middle_goes_on_and_no_message_is_worked_twice(
    pair: Pair, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    run = pair.run(WARD, "ward", marks, rounds=4, hold=3)
    for place in (0, 1):
        pair.until_marked(marks, place, "begun 3")
    pair.kill("coordinator")
    (marks / "go-0").touch()  # one site ends its work while nobody is there
    pair.until_marked(marks, 0, "done 3")
    pair.start_coordinator()
    pair.wait_for("coordinator", lambda: pair.here() == set(pair.names))
    (marks / "go-1").touch()
    detail = pair.finish(run)
    assert detail.info.state == "done", detail.info.detail
    for place in (0, 1):
        lines = (marks / f"site-{place}").read_text().split("\n")[:-1]
        assert lines == [f"{what} {k}" for k in (1, 2, 3, 4) for what in ("begun", "done")]
    [last] = [v for k, v in pair.result(run)["train"].items() if k == "4"]
    assert last["messages"] == 4.0
    assert [r.round for r in detail.receipts] == [1, 2, 3, 4]
    assert all(len(r.counted) == 2 and not r.missing for r in detail.receipts)
    shown = fedml("run", "show", run, profile=pair.hub / "operator")
    assert re.search(r"^exchange 3 \(train\): asked (bern, chur|chur, bern); ", shown.stdout, re.M)
    assert re.search(r"counted    chur  reply [0-9a-f]{12}", shown.stdout)
    assert "receipts verified, head" in shown.stdout
    assert fedml("run", "list", profile=pair.hub / "operator").returncode == 0


def test_a_site_killed_at_work_works_again_from_the_state_before(
    pair: Pair, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    run = pair.run(WARD, "ward", marks, rounds=3, hold=2)
    for place in (0, 1):
        pair.until_marked(marks, place, "begun 2")
    slot = pair.site("chur") / f"slots/{run}.safetensors"
    assert slot.exists()
    pair.kill("chur")
    (marks / "go-0").touch()
    pair.open_all()  # and the killed one's child is gone by now
    (marks / "go-1").touch()
    detail = pair.finish(run)
    assert detail.info.state == "done", detail.info.detail
    chur = (marks / "site-1").read_text().split()[1::2]
    assert chur == ["1", "1", "2", "2", "2", "3", "3"]  # counted from 1 again after the kill
    assert pair.result(run)["train"]["3"]["messages"] == 3.0
    pair.wait_for("chur", lambda: not slot.exists())  # the run is over


def test_a_client_app_that_raises_answers_with_an_error(pair: Pair, tmp_path: Path) -> None:
    run = pair.run(WARD, "ward", tmp_path / "marks", rounds=2, raise_at=1)
    detail = pair.finish(run)
    assert detail.info.state == "done", detail.info.detail
    place = pair.hub / "flower/runs" / run
    [[site, reason]] = json.loads((place / "result.json").read_text())["exchanges"][0]["failures"]
    assert site == 1
    assert "no such ward" in reason
    assert pair.result(run)["train"]["2"]["messages"] == 2.0  # what it counted before it raised
    assert "ValueError: no such ward" in pair.log("chur")


def test_who_is_late_or_away_has_not_replied(pair: Pair, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    run = pair.run(WARD, "ward", marks, rounds=1, hold=1, timeout=8.0)
    marks.joinpath("go-0").touch()
    [receipt] = pair.finish(run).receipts
    assert receipt.missing == {"chur": "no reply within 8 s"}
    marks = tmp_path / "more"
    run = pair.run(WARD, "ward", marks, rounds=2, hold=1)
    pair.until_marked(marks, 1, "begun 1")
    pair.kill("chur")
    marks.joinpath("go-0").touch()
    detail = pair.finish(run)
    assert detail.receipts[0].missing == {"chur": "away for more than 5 s"}
    assert [one.site for one in detail.receipts[0].counted] == ["bern"]
    pair.open_all()


def test_only_sites_whose_operator_allowed_the_digest_are_asked(pair: Pair, tmp_path: Path) -> None:
    app = pair.folder / "lone"
    run = pair.run(app, "lone", tmp_path / "one", least=1, rounds=1)
    [receipt] = pair.finish(run).receipts
    assert receipt.asked == ("bern",)
    run = pair.run(app, "lone", tmp_path / "two", rounds=1)
    pair.until(run, lambda d: "1 of 2 sites are here that allow app lone" in d.info.detail)
    stop = fedml("run", "stop", run, profile=pair.hub / "operator")
    assert stop.returncode == 0
    assert pair.finish(run).info.state == "stopped"


def test_a_run_that_was_stopped_goes_on_where_it_was(pair: Pair, tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    run = pair.run(WARD, "ward", marks, rounds=3, hold=2)
    for place in (0, 1):
        pair.until_marked(marks, place, "begun 2")
    pair.ask(lambda c: c.stop_run(run))
    assert pair.finish(run).info.state == "stopped"
    for place in (0, 1):
        (marks / f"go-{place}").touch()
    pair.ask(lambda c: c.resume_run(run))
    detail = pair.finish(run)
    assert detail.info.state == "done", detail.info.detail
    assert pair.result(run)["train"]["3"]["messages"] == 3.0
    assert (marks / "site-0").read_text().split()[1::2] == ["1", "1", "2", "2", "2", "3", "3"]


def test_wrong_requests_are_a_line(pair: Pair, tmp_path: Path) -> None:
    profile = pair.hub / "operator"
    other = lone(tmp_path / "other")
    (other / "ward_app.py").write_text("import os\n")
    refused = fedml("flower", "run", str(other), "--federation", profile=profile)
    assert re.match(r"app lone [0-9a-f]{12} is not allowed here; ", complaint(refused))
    key = fedml(
        "flower", "run", str(WARD), "--federation", "-c", "wards=3", profile=profile
    )  # fmt: skip
    assert "wards: the app has no such setting" in complaint(key)
    kept = fedml("flower", "run", str(WARD), "--federation", "--folder", "x", profile=profile)
    assert complaint(kept).startswith("--federation keeps the run at the coordinator")
    bern = str(pair.site("bern"))
    again = fedml("site", "allow-app", bern, str(WARD), "--privacy", "none")
    assert "[apps.ward] is there already" in complaint(again)
    private = fedml("site", "allow-app", bern, str(WARD), "--privacy", "record")
    assert "no other privacy than none" in complaint(private)
    nothing = fedml("coordinator", "allow-app", str(pair.hub), str(tmp_path / "nothing"))
    assert "pyproject.toml does not exist" in complaint(nothing)


def test_a_run_whose_app_was_changed_at_the_coordinator_stands_until_it_is_mended(
    pair: Pair, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    run = pair.run(WARD, "ward", marks, rounds=2, hold=2)
    pair.until_marked(marks, 0, "begun 2")
    pair.kill("coordinator")
    [copy] = pair.hub.glob("flower/ward-*/ward_app.py")
    text = copy.read_text()
    copy.write_text(text + "\nimport os\n")
    pair.start_coordinator()
    pair.until(run, lambda d: "is not what it was when" in d.info.detail)
    copy.write_text(text)
    pair.kill("coordinator")
    for place in (0, 1):
        (marks / f"go-{place}").touch()
    pair.start_coordinator()
    assert pair.finish(run).info.state == "done"
    assert (marks / "site-0").read_text().split()[1::2] == ["1", "1", "2", "2"]


def test_a_copy_that_was_changed_does_not_run(pair: Pair, tmp_path: Path) -> None:
    [copy] = pair.site("chur").glob("apps/ward-*/ward_app.py")
    text = copy.read_text()
    copy.write_text(text + "\nimport os\n")
    try:
        run = pair.run(WARD, "ward", tmp_path / "marks", rounds=1)
        [receipt] = pair.finish(run).receipts
    finally:
        copy.write_text(text)
    assert "its files are not those of the digest" in receipt.missing["chur"]
    assert not (tmp_path / "marks/site-1").exists()
