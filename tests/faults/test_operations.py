"""What operators do to a federation that is under way: two runs, stop, resume, end, look, list.

Real programs and their command line. The sites work for one run at a time, so runs take turns.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import psutil
import pytest

from fedml import durable
from fedml import settings as files
from fedml.cli.demo.federation import free_ports
from fedml.coordinator.settings import read_settings
from fedml.errors import Unreachable
from fedml.protocol.messages import RunId
from fedml.protocol.operations import RunDetail
from fedml.rounds import Plan
from tests.faults.contract import keep, uphold
from tests.faults.fleet import COORDINATOR, PATIENCE, SITES, Fleet, plan
from tests.faults.schedule import Tally

pytestmark = pytest.mark.slow
LONG = 600.0  # seconds that a drain may take: more than a test waits for
AWAY = 60.0  # a site may be away for so long


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    [port] = free_ports(1)
    folder = tmp_path_factory.mktemp("fleet")
    with Fleet(folder, runs_at_once=1, grace=AWAY, drain=LONG, health_port=port) as a_fleet:
        yield a_fleet.found()


# --- several runs -------------------------------------------------------------------------------


def test_two_runs_take_turns_at_the_sites_and_each_ends_in_the_bytes_of_a_run_alone(
    fleet: Fleet,
) -> None:
    plans = plan(seed=1), plan(seed=2)
    child, first = at_work(fleet, "bern", plans[0])
    second = fleet.submit(plans[1])
    fleet.wait_for(COORDINATOR, lambda: "runs_at_once = 1" in fleet.show(second).info.detail)
    child.resume()
    for run, a_plan in zip((first, second), plans, strict=True):
        fleet.finish(run)
        uphold(fleet, run, a_plan, [], Tally())
    told = [r for r in journal(fleet) if r["entry"]["run"] in (first, second)]
    rounds = [r for r in told if r["kind"] in ("RoundOpened", "RoundCommitted")]
    opened = [r["entry"]["run"] for r in rounds if r["kind"] == "RoundOpened"]
    assert all(one != other for one, other in pairwise(opened))  # turn and turn about
    for one, other in pairwise(rounds):  # and never two rounds at once
        assert (one["kind"] == "RoundOpened") == (other["kind"] == "RoundCommitted"), rounds


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_run_that_was_stopped_goes_on_from_its_last_committed_round(
    fleet: Fleet, private: bool
) -> None:
    a_plan = plan(seed=3, private=private, rounds=8)
    run = fleet.submit(a_plan)
    fleet.wait_for(COORDINATOR, lambda: bool(keep(fleet, run).rounds))
    catch(fleet, "bern")
    said = fedml(fleet, "run", "stop", run)
    assert said.stdout.startswith((f"stopping {run}", f"{run}  stopped")), said
    stopped = until_ended(fleet, run, times=1)
    assert (stopped.info.state, 1 <= stopped.info.round < 8) == ("stopped", True), stopped.info
    assert fleet.until(lambda: not left(fleet, run), PATIENCE), left(fleet, run)
    committed = keep(fleet, run)
    assert fedml(fleet, "run", "resume", run).stdout == f"resumed {run}\n"
    detail = until_ended(fleet, run, times=2)
    assert detail.info.round == 8
    uphold(fleet, run, a_plan, [committed], Tally())


def test_runs_that_wait_are_listed_with_their_place(fleet: Fleet) -> None:
    runs = [fleet.submit(plan(seed=4)) for _ in range(2)]
    task = ("task=breast_cancer", "cohort.quorum=2", "cohort.deadline=9")
    then = time.time() + 3600
    ahead = time.strftime("%Y-%m-%dT%H:%M", time.localtime(then))
    said = fedml(fleet, "run", "submit", "--at", ahead, *task).stdout
    later = said.split()[1].rstrip(",")
    hour = time.strftime("%Y-%m-%d %H:%M:00 UTC", time.gmtime(then))
    assert said == f"submitted {later}, scheduled: starts {hour}\n"
    listed = {row["id"]: row for row in rows(fedml(fleet, "run", "list", "--json"))}
    assert (listed[later]["state"], listed[later]["round"]) == ("scheduled", 0)
    assert hour in " ".join(fedml(fleet, "run", "list").stdout.split())
    late = fedml(fleet, "run", "submit", "--at", "2001-01-01T00:00+01:00", *task, status=1)
    assert re.fullmatch(
        r"error: --at '2001-01-01T00:00\+01:00' has passed, it is .* UTC; leave it out for now\n",
        late.stderr,
    )
    assert fedml(fleet, "run", "stop", later).stdout.startswith(("stopping", f"{later}  stopped"))
    again = fedml(fleet, "run", "resume", runs[0] + "0", status=1)
    assert again.stderr.startswith(f"error: no run '{runs[0]}0'; there are ")
    for run in runs:
        fleet.finish(run)


# --- receipts -----------------------------------------------------------------------------------


def test_a_receipt_that_was_changed_on_the_disk_is_an_alarm(fleet: Fleet) -> None:
    run = fleet.submit(plan(seed=5))
    fleet.finish(run)
    shown = fedml(fleet, "run", "show", run).stdout
    [receipt, *_] = fleet.show(run).receipts
    assert f"round 1: asked bern, oslo; model {receipt.model[:12]}" in shown
    for one in receipt.counted:
        assert f"counted    {one.site}  weight 24  update {one.digest[:12]}" in shown
    told = json.loads(fedml(fleet, "run", "show", run, "--json").stdout)
    assert (told["verified"], told["alarm"]) == (True, "")
    assert shown.endswith(f"receipts verified, head {told['head']}\n")
    path = fleet.hub / "journal.jsonl"
    stop(fleet, COORDINATOR)
    sound = path.read_bytes()
    path.write_bytes(b"".join(_forged(line, run) for line in sound.splitlines(True)))
    start(fleet, COORDINATOR)
    shown_again = fedml(fleet, "run", "show", run, status=1)
    alarm = f"{run}: receipt 2 (train round 2) or one before it was changed, added or taken out"
    assert shown_again.stderr == f"error: {alarm}; alarm\n"
    assert "verified" not in shown_again.stdout
    told = json.loads(fedml(fleet, "run", "show", run, "--json", status=1).stdout)
    assert (told["verified"], told["alarm"], told["head"]) == (False, f"{alarm}; alarm", "")
    stop(fleet, COORDINATOR)
    path.write_bytes(sound)
    start(fleet, COORDINATOR)
    assert "receipts verified" in fedml(fleet, "run", "show", run).stdout


def _forged(line: bytes, run: RunId) -> bytes:
    """Return a line of the journal, in order, with the weights of the run's second round raised."""
    record = json.loads(line.partition(b" ")[2])
    receipt = record["entry"].get("receipt", {})
    if record["entry"]["run"] != run or (receipt.get("kind"), receipt.get("round")) != ("train", 2):
        return line
    for one in receipt["counted"]:
        one["weight"] *= 2
    body = durable.dump_json(record)
    return b"%08x %s\n" % (zlib.crc32(body), body)


# --- told to stop -------------------------------------------------------------------------------


def test_a_coordinator_that_is_told_to_stop_ends_the_open_round_and_opens_no_other(
    fleet: Fleet,
) -> None:
    a_plan = plan(seed=6)
    assert health(fleet, "readyz") == (200, "ok\n")
    child, run = at_work(fleet, "bern", a_plan)
    fleet.tell_to_stop(COORDINATOR)
    fleet.wait_for(COORDINATOR, lambda: health(fleet, "readyz")[0] == 503)
    assert health(fleet, "readyz") == (503, "the coordinator is going down\n")
    assert health(fleet, "healthz") == (200, "ok\n")
    with pytest.raises(Unreachable, match="is going down; ask again when it is back"):
        fleet.submit(plan(seed=7))
    child.resume()
    assert fleet.has_stopped(COORDINATOR) == 0
    assert [r["kind"] for r in fleet.journal(run)][-2:] == ["RoundOpened", "RoundCommitted"]
    start(fleet, COORDINATOR)
    fleet.finish(run)
    uphold(fleet, run, a_plan, [], Tally())
    assert {receipt.attempt for receipt in fleet.show(run).receipts} == {1}


def test_what_a_drain_has_no_time_for_is_parked_and_goes_on_where_it_was(fleet: Fleet) -> None:
    a_plan = plan(seed=8)
    stop(fleet, COORDINATOR)
    settle(fleet, drain=0.2)
    start(fleet, COORDINATOR)
    child, run = at_work(fleet, "bern", a_plan)
    fleet.wait_for("oslo", lambda: bool(kept(fleet, "oslo", run)))  # its part is done
    stop(fleet, COORDINATOR)
    [parked] = [line for line in lines(fleet, COORDINATOR) if "parked" in line["event"]]
    assert (parked["run"], parked["round"], parked["sites"]) == (run, 1, list(SITES))
    settle(fleet, drain=LONG)
    start(fleet, COORDINATOR)
    child.resume()
    fleet.finish(run)
    uphold(fleet, run, a_plan, [], Tally())
    assert {receipt.attempt for receipt in fleet.show(run).receipts} == {1}


def test_told_twice_a_coordinator_ends_at_once(fleet: Fleet) -> None:
    a_plan = plan(seed=9)
    child, run = at_work(fleet, "bern", a_plan)
    fleet.tell_to_stop(COORDINATOR)
    fleet.wait_for(COORDINATOR, lambda: health(fleet, "readyz")[0] == 503)
    fleet.tell_to_stop(COORDINATOR)
    assert fleet.has_stopped(COORDINATOR) == 0
    start(fleet, COORDINATOR)
    child.resume()
    fleet.finish(run)
    uphold(fleet, run, a_plan, [], Tally())


@pytest.mark.parametrize("seconds", [LONG, 0.2], ids=["in time", "parked"])
def test_a_site_that_is_told_to_stop_ends_its_task_or_takes_it_up_again(
    fleet: Fleet, seconds: float
) -> None:
    a_plan = plan(seed=10)
    path = fleet.site("bern") / "site.toml"
    before = path.read_text()
    path.write_text(re.sub(r"drain = .*", f"drain = {seconds}", before))
    stop(fleet, "bern")
    start(fleet, "bern")
    child, run = at_work(fleet, "bern", a_plan)
    fleet.tell_to_stop("bern")
    for process in (child, child.parent()):  # as service managers do
        assert process is not None
        process.terminate()
    fleet.wait_for("bern", lambda: lines(fleet, "bern")[-1]["event"].startswith(("drain", "task")))
    if seconds == LONG:
        child.resume()
    assert fleet.has_stopped("bern") == 0
    said = [line["event"] for line in lines(fleet, "bern")]
    assert sum("task parked" in event for event in said) == (seconds != LONG)
    path.write_text(before)
    start(fleet, "bern")
    fleet.finish(run)
    uphold(fleet, run, a_plan, [], Tally())
    assert {receipt.attempt for receipt in fleet.show(run).receipts} == {1}


# --- logs and figures ---------------------------------------------------------------------------


def test_every_line_about_a_run_a_round_or_a_site_names_it(fleet: Fleet) -> None:
    a_plan = plan(seed=11)
    run = fleet.submit(a_plan)
    fleet.finish(run)
    told = lines(fleet, COORDINATOR)
    mine = [line for line in told if line.get("run") == run]
    assert [line["event"] for line in mine] == [*["round opened", "round closed"] * 4, "run ended"]
    numbers = [1, 1, 2, 2, 3, 3, 3, 3]  # the last two are the evaluation
    assert [line["round"] for line in mine[:-1]] == numbers
    assert all(line.get("site") in SITES for line in told if line["event"].startswith("site "))
    for site in SITES:
        said = lines(fleet, site)
        assert {line.get("site") for line in said} == {site}
    concern = [line for line in told if re.search(rf"\b{run}\b", json.dumps(line))]
    assert concern == mine
    _, stopped = at_work(fleet, "bern", a_plan)
    fleet.ask(lambda c: c.stop_run(stopped))
    until_ended(fleet, stopped, times=1)
    fleet.wait_for("bern", lambda: "task cancelled" in fleet.log("bern"))
    [cancelled] = [x for x in lines(fleet, "bern") if x["event"] == "task cancelled" and
                   x.get("run") == stopped]  # fmt: skip
    assert (cancelled["site"], cancelled["round"]) == ("bern", 1)


def test_figures_are_beside_the_health_checks(fleet: Fleet) -> None:
    status, text = health(fleet, "metrics")
    assert status == 200
    assert re.search(r"^fedml_sites_connected 2\.0$", text, re.M)
    assert health(fleet, "nothing") == (404, "there are /healthz, /readyz and /metrics\n")


# --- how ----------------------------------------------------------------------------------------


def at_work(fleet: Fleet, site: str, a_plan: Plan) -> tuple[psutil.Process, RunId]:
    """Submit a run and stop the clock of a site in the middle of its first task."""
    fleet.arm(site, "worker.begun:1:delay=2")
    run = fleet.submit(a_plan)
    return catch(fleet, site, armed=True), run


def catch(fleet: Fleet, site: str, *, armed: bool = False) -> psutil.Process:
    """Suspend the process that does a site's next task; it is in the middle of it."""
    if not armed:
        fleet.arm(site, "worker.begun:1:delay=2")
    fleet.wait_for(site, lambda: not fleet.is_armed(site))
    worker = fleet.worker(site)
    assert worker is not None
    [child] = worker.children()
    child.suspend()
    return child


def stop(fleet: Fleet, name: str) -> None:
    fleet.tell_to_stop(name)
    assert fleet.has_stopped(name) == 0, fleet.log(name)[-1000:]


def start(fleet: Fleet, name: str) -> None:
    fleet.launch(name)
    fleet.until_all_are_here()


def settle(fleet: Fleet, **changes: float) -> None:
    """Change settings of the coordinator, for its next start."""
    files.write(replace(read_settings(fleet.hub), **changes), fleet.hub / "coordinator.toml")  # type: ignore[arg-type]


def until_ended(fleet: Fleet, run: RunId, *, times: int) -> RunDetail:
    """Return a run once it has ended so many times."""

    def ends() -> int:
        return sum(record["kind"] == "Ended" for record in fleet.journal(run))

    fleet.wait_for(COORDINATOR, lambda: ends() == times)
    return fleet.show(run)


def left(fleet: Fleet, run: RunId) -> list[str]:
    """Return what sites still have of a run: orders, results, reserved budget."""
    found = [kept(fleet, site, run) for site in SITES]
    reserved = [
        e.task for s in SITES for e in fleet.ledger(s) if (e.run, e.state) == (run, "reserved")
    ]
    return [*found[0], *found[1], *reserved]


def kept(fleet: Fleet, site: str, run: RunId) -> list[str]:
    """Return the tasks of a run whose answer lies at a site."""
    return [path.name for path in (fleet.site(site) / "tasks").glob(f"{run}.*/trained")]


def journal(fleet: Fleet) -> list[Any]:
    return list(durable.read_log(fleet.hub / "journal.jsonl"))


def lines(fleet: Fleet, name: str) -> list[dict[str, Any]]:
    """Return what a program said, one object a line."""
    return [json.loads(line) for line in fleet.log(name).splitlines()]


def health(fleet: Fleet, what: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{read_settings(fleet.hub).health_port}/{what}"
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def fedml(fleet: Fleet, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command as the coordinator's operator."""
    profile = ("--profile", str(fleet.hub / "operator"))
    done = subprocess.run(
        [sys.executable, "-m", "fedml", *arguments, *profile],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == status, (done.args, done.stdout, done.stderr)
    return done


def rows(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]
