"""Whatever the network does to one site's line, the run ends in the bytes it would have had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fedml import settings as files
from fedml.coordinator.settings import read_settings
from fedml.params import encode
from fedml.protocol.messages import RunId
from fedml.rounds import Plan
from fedml.transport import flow
from tests.faults.contract import uphold
from tests.faults.fleet import COORDINATOR, HEARTBEAT, PATIENCE, ROOT, Fleet, first_params, plan
from tests.faults.relay import Relay, Way
from tests.faults.schedule import Tally

pytestmark = pytest.mark.slow
LINE = "oslo"  # the site behind the relay
SIZE = sum(len(piece) for piece in encode({"": first_params(plan(0))}))
CHUNK = 2**20


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Fleet, Relay]]:
    fleet = Fleet(tmp_path_factory.mktemp("line"), grace=4.0)
    with Relay(fleet.port) as relay, fleet:
        fleet.found({LINE: f"localhost:{relay.port}"})
        yield fleet, relay


@pytest.fixture
def fleet(line: tuple[Fleet, Relay]) -> Iterator[Fleet]:
    fleet, relay = line
    yield fleet
    relay.mend()
    fleet.until_all_are_here()


@pytest.fixture
def relay(line: tuple[Fleet, Relay]) -> Relay:
    return line[1]


def begun(fleet: Fleet, a_plan: Plan) -> RunId:
    """Submit a run, and return once its first round is open."""
    run = fleet.submit(a_plan)
    assert fleet.until(lambda: len(fleet.journal(run)) > 1, PATIENCE)
    return run


def has_committed(fleet: Fleet, run: RunId) -> bool:
    """True once a round of the run is committed."""
    return any(record["kind"] == "RoundCommitted" for record in fleet.journal(run))


def ends_well(fleet: Fleet, run: RunId, a_plan: Plan) -> Tally:
    """Let the run end, and hold it against the contract."""
    tally = Tally()
    fleet.finish(run)
    uphold(fleet, run, a_plan, [], tally)
    return tally


@pytest.mark.parametrize("seconds", [0.0, 1.0, 6.0])
def test_a_cut_line_for_less_and_for_more_than_the_grace(
    fleet: Fleet, relay: Relay, seconds: float
) -> None:
    """6 s are 15 heartbeats and more than the grace: as much as minutes are with longer ones."""
    a_plan = plan(int(seconds))
    run = begun(fleet, a_plan)
    relay.cut()
    fleet.until(lambda: fleet.has_ended(run), seconds)
    assert not fleet.has_ended(run) or seconds == 0
    relay.mend()
    ends_well(fleet, run, a_plan)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_line_that_is_silent_one_way_is_noticed_by_its_missing_beats(
    fleet: Fleet, relay: Relay, way: Way
) -> None:
    """Long before any keepalive of the connection itself would, which takes more than a minute."""
    a_plan = plan(20)
    run = begun(fleet, a_plan)
    for name in ("coordinator", LINE):
        fleet.news(name)
    relay.silence(way)
    said = ""

    def noticed() -> bool:
        nonlocal said
        said += fleet.news("coordinator" if way == "up" else LINE)
        sign = "site silent" if way == "up" else "the coordinator was silent for"
        return sign in said

    assert fleet.until(noticed, 10), said
    if way == "up":
        [silent] = [json.loads(x) for x in said.splitlines() if "site silent" in x][:1]
        assert (silent["site"], silent["seconds"]) == (LINE, round(3 * HEARTBEAT, 1))
    relay.mend()
    ends_well(fleet, run, a_plan)


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.parametrize("byte", [0, 70_000, CHUNK + 90_000, 2 * CHUNK, 2 * CHUNK + 120_000])
def test_a_reset_at_any_byte_of_a_transfer_costs_the_rest_and_no_more(
    fleet: Fleet, relay: Relay, way: Way, byte: int
) -> None:
    """What went twice is less than a chunk and what was under way, never all from zero."""
    a_plan = plan(30, rounds=1)
    before, known = relay.passed(way), len(fleet.log(LINE))
    relay.reset_after(way, byte)
    run = fleet.submit(a_plan)
    tries = ends_well(fleet, run, a_plan).asked_again
    assert not relay.is_due(way)
    downloads = 2 if way == "down" else 1  # the round's model, and then the model to be scored
    again = relay.passed(way) - before - (downloads + tries) * SIZE
    dials = fleet.log(LINE)[known:].count('"connected"')  # on a busy machine more than the one
    assert again < max(1, dials) * (CHUNK + 300_000)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_wrong_bit_is_never_taken_for_right(fleet: Fleet, relay: Relay, way: Way) -> None:
    a_plan = plan(40, rounds=1)
    relay.spoil_after(way, CHUNK + 5)
    run = fleet.submit(a_plan)
    ends_well(fleet, run, a_plan)
    assert not relay.is_due(way)


@pytest.mark.timeout(300)
def test_megabytes_at_200_ms_and_1_mbit_per_second_cost_time_and_no_round(
    fleet: Fleet, relay: Relay
) -> None:
    """Each way the model takes 14 heartbeats; nobody is taken for silent, which takes 3."""
    a_plan = plan(55, rounds=1, deadline=120.0)
    settle(fleet, heartbeat=3 * HEARTBEAT)  # a busy machine may be silent for three of the others
    for name in ("coordinator", LINE):
        fleet.news(name)
    relay.slow(delay=0.2, rate=125e3)
    run = fleet.submit(a_plan)
    committed = fleet.until(lambda: has_committed(fleet, run), 150)
    relay.mend()  # the evaluation's model has the same way
    assert committed, fleet.show(run).info
    assert "site silent" not in fleet.news("coordinator")
    assert "was silent" not in fleet.news(LINE)
    assert ends_well(fleet, run, a_plan).asked_again == 0
    settle(fleet, heartbeat=HEARTBEAT)


def settle(fleet: Fleet, heartbeat: float) -> None:
    """Start the coordinator anew, with another heartbeat."""
    fleet.tell_to_stop(COORDINATOR)
    assert fleet.has_stopped(COORDINATOR) == 0
    settings = replace(read_settings(fleet.hub), heartbeat=heartbeat)
    files.write(settings, fleet.hub / "coordinator.toml")
    fleet.launch(COORDINATOR)
    fleet.until_all_are_here()


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_site_that_falls_silent_in_the_middle_of_a_transfer_is_noticed(
    fleet: Fleet, relay: Relay, way: Way
) -> None:
    """Not after three heartbeats, but by the pace of what had come; long before `PATIENCE`."""
    a_plan = plan(56, rounds=1)
    before = relay.passed(way)
    relay.slow(rate=500e3)
    for name in ("coordinator", LINE):
        fleet.news(name)
    run = fleet.submit(a_plan)
    assert fleet.until(lambda: relay.passed(way) > before + SIZE // 2, PATIENCE)
    relay.silence(way)
    said = ""

    def noticed() -> bool:
        nonlocal said
        said += fleet.news("coordinator" if way == "up" else LINE)
        return ("site silent" if way == "up" else "the coordinator was silent for") in said

    assert fleet.until(noticed, flow.PATIENCE / 2), said
    relay.mend()
    ends_well(fleet, run, a_plan)


WEATHER = """
import sys, tempfile; from pathlib import Path
from tests.faults.contract import uphold
from tests.faults.fleet import Fleet, plan
from tests.faults.schedule import Tally
with tempfile.TemporaryDirectory() as place, Fleet(Path(place), heartbeat=2.0, grace=10.0) as fleet:
    fleet.found()
    a_plan = plan(60, recipe="small", rounds=2)
    run = fleet.submit(a_plan)
    fleet.finish(run)
    uphold(fleet, run, a_plan, [], Tally())
"""


@pytest.mark.timeout(300)
def test_five_percent_loss_200_ms_and_1_mbit_per_second() -> None:
    """In a network of its own, where the kernel itself loses and delays packets."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "ip", "tc"))):
        pytest.skip("needs root, unshare, ip and tc")
    rough = "tc qdisc add dev lo root netem loss 5% delay 200ms rate 1mbit"
    within = ["unshare", "--net", "sh", "-c"]
    probe = subprocess.run(
        [*within, f"ip link set lo up && {rough}"], capture_output=True, text=True
    )
    if probe.returncode != 0:
        pytest.skip(f"this kernel has no network namespaces with netem: {probe.stderr.strip()}")
    done = subprocess.run(
        [*within, f'ip link set lo up && {rough} && exec "$0" -c "$1"',
         sys.executable, WEATHER],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
