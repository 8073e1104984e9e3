"""Four hospitals and their coordinator as real processes: wrong input is one line, and kill -9 is
an inconvenience. The tests share one town and leave it as they found it, but for its history."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedml import durable
from fedml.identity.certificates import Authority
from fedml.identity.enrolment import Token
from fedml.protocol.messages import RunId
from fedml.protocol.operations import Receipt, RunDetail
from tests.system.town import Start, Started, Town, command, complaint, fedml, last_words

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    a_town = Town(tmp_path_factory.mktemp("town"))
    with a_town:
        a_town.found()
        yield a_town
    for name in ("coordinator", *a_town.names):  # told to stop as the block was left
        assert a_town.end(name) == 0
        assert "Traceback" not in a_town.log(name)


@pytest.fixture
def later(tmp_path: Path) -> Iterator[Start]:
    """Start commands that go on while the test does; none outlives it."""
    started: list[Started] = []

    def start(*arguments: str, profile: Path | None = None) -> Started:
        place = tmp_path / "output" / str(len(started))
        started.append(Started(place, command(*arguments, profile=profile)))
        return started[-1]

    yield start
    for each in started:
        each.kill()


# --- wrong input at the command line ------------------------------------------------------------


def test_wrong_plans_are_one_line_with_all_that_is_wrong(town: Town, later: Start) -> None:
    operator = town.hub / "operator"
    plan = ("run", "submit", "task=breast_cancer", "cohort.deadline=9")
    tries = [
        later(*plan, *more, profile=operator)
        for more in (
            ("cohort.quorum=3", "cohort.size=2", "seed=-1", "attempts=0"),
            ("cohort.quorum=2", "recipe.name=poetry"),
            ("cohort.quorum=2", "rouns=5"),
            (),
        )
    ]
    contradictory, unknown, wrong, missing = (complaint(each.end()) for each in tries)
    for reason in ("seed -1", "attempts 0", "cohort.quorum 3 is above cohort.size 2"):
        assert reason in contradictory
    assert "no recipe 'poetry' here; there are breast_cancer, " in unknown
    assert "rouns" in wrong
    assert "cohort.quorum" in missing
    assert not [info for info in town.ask(lambda c: c.list_runs()) if info.state == "queued"]


def test_what_does_not_exist_is_named(town: Town, tmp_path: Path) -> None:
    operator = town.hub / "operator"
    release = fedml("model", "release", "breast_cancer", "77", profile=operator)
    assert complaint(release) == (
        "no version 77 of model 'breast_cancer' is registered; list them first"
    )
    watch = fedml("run", "watch", "nope-1", profile=operator)
    assert complaint(watch).startswith("no run 'nope-1'; there are ")
    nobody = fedml("run", "list", profile=tmp_path)
    assert complaint(nobody).startswith(f"{tmp_path} holds no operator credentials; name them")
    role = fedml("coordinator", "invite", "zug", "--role", "king", profile=operator)
    assert complaint(role) == "role 'king': use site, region, operator or viewer"
    name = fedml("coordinator", "invite", "../zug", profile=operator)
    assert "'../zug': use 1-63 of a-z 0-9" in complaint(name)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "identity.json").write_text("{")
    assert "identity.json is damaged" in complaint(fedml("run", "list", profile=damaged))


def test_tokens_serve_once_in_time_and_here(town: Town, tmp_path: Path) -> None:
    token = town.token("zug")
    first = subprocess.run(joining(tmp_path / "zug", token), capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    thief = complaint(run(joining(tmp_path / "thief", token)))
    assert thief == "the join token was used already; ask for a new one"
    late = complaint(run(joining(tmp_path / "late", town.token("late", ttl=0.001))))
    assert late == "the join token expired; ask for a new one"
    other = Authority.create(tmp_path / "other", time.time())
    forged = Token("id", "secret", Token.parse(token).address, other.certificate).text()
    assert complaint(run(joining(tmp_path / "forged", forged))).startswith(
        "the token is for another coordinator"
    )
    cut = complaint(run(joining(tmp_path / "cut", token[:-5])))
    assert cut.endswith("is cut or mistyped; copy it whole")
    for name in ("thief", "late", "forged", "cut"):
        assert not (tmp_path / name / "identity" / "identity.json").exists()


def test_a_join_that_broke_off_after_the_token_was_spent_goes_on(
    town: Town, tmp_path: Path
) -> None:
    token = town.token("chur")
    assert run(joining(tmp_path / "chur", token)).returncode == 0
    (tmp_path / "chur" / "site.toml").unlink()  # as if the line was cut just before
    (tmp_path / "chur" / "trust" / "root.json").unlink()
    again = run(joining(tmp_path / "chur", token))
    assert again.returncode == 0, again.stderr
    assert "chur has joined" in again.stdout
    assert (tmp_path / "chur" / "trust" / "root.json").exists()


def joining(folder: Path, token: str) -> list[str]:
    return command("site", "join", token, "--dir", str(folder))


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=60)


# --- programs that cannot start -----------------------------------------------------------------


def test_a_coordinator_that_cannot_run_says_why(town: Town, tmp_path: Path, later: Start) -> None:
    from fedml.coordinator.folder import create
    from fedml.coordinator.settings import read_settings

    taken = read_settings(town.hub)
    for name in ("taken", "broken", "damaged"):
        create(tmp_path / name, taken)
    (tmp_path / "broken" / "coordinator.toml").write_text('port = "many"\nprot = 1\n')
    log = durable.Log(tmp_path / "damaged" / "journal.jsonl")
    for number in range(3):
        log.append({"number": number})
    log.close()
    journal = tmp_path / "damaged" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"number":1', b'"number":7'))
    names = ("taken", "broken", "damaged", "none")
    tries = [later("coordinator", "run", str(tmp_path / name)) for name in names]
    tries.append(later("coordinator", "run", str(town.hub)))
    port, broken, damaged, none, twice = (last_words(each.end()) for each in tries)
    assert port == (
        f"cannot listen on 127.0.0.1:{taken.port}: is the port taken? Stop what has it, "
        "or set another"
    )
    assert broken.startswith(f"{tmp_path / 'broken' / 'coordinator.toml'}: ")
    assert "port 'many': must be a whole number" in broken
    assert "prot is unknown" in broken
    assert damaged.startswith(f"{journal}: damaged at byte ")
    assert damaged.endswith("restore it from a backup")
    assert none.endswith(f"run 'fedml coordinator init {tmp_path / 'none'}'")
    assert not (tmp_path / "none").exists()
    process = town.pid("coordinator")
    assert twice == (
        f"{town.hub} is in use by a coordinator (process {process}); stop that one first"
    )


def test_a_site_that_cannot_run_says_why(town: Town, tmp_path: Path, later: Start) -> None:
    bern = str(town.site("bern"))
    none, twice = (
        later("site", "run", str(tmp_path / "none")),
        later("site", "run", bern),
    )
    assert f"{tmp_path / 'none'} is no site folder yet" in last_words(none.end())
    assert not (tmp_path / "none").exists()
    process = town.pid("bern")
    assert last_words(twice.end()) == (
        f"{bern} is in use by a site daemon (process {process}); stop that one first"
    )


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    made = fedml("coordinator", "init", str(tmp_path / "file" / "hub"))
    assert made.returncode == 1
    assert "Traceback" not in made.stderr
    assert "Not a directory; is the path right?" in made.stderr.splitlines()[-1]


# --- told to stop -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "expected"), [(signal.SIGINT, (130, 130, 0)), (signal.SIGTERM, (143, 143, 0))]
)
def test_long_commands_end_when_they_are_told(
    town: Town, tmp_path: Path, later: Start, told: signal.Signals, expected: tuple[int, ...]
) -> None:
    run = town.submit("rounds=1", "cohort.quorum=4", "cohort.sites=[bern,kyoto,oslo,nowhere]")
    folder = f"hydra.run.dir={tmp_path / 'simulation'}"
    (tmp_path / "shelf").mkdir()
    started = [
        (later("run", "watch", run, profile=town.hub / "operator"), "waiting"),
        (later("simulate", "rounds=100000", folder), "round 2:"),
        (later("serve", str(tmp_path), "--rest-port", "0", "--grpc-port", "0"), "{"),
    ]
    for process, sign in started:
        process.until_it_says(sign)
        process.process.send_signal(told)
    for (process, _), status in zip(started, expected, strict=True):
        done = process.end()
        assert done.returncode == status, (done.args, done.stderr)
        assert "Traceback" not in done.stderr
    town.ask(lambda c: c.stop_run(run))
    town.finish(run)


def test_programs_end_when_they_are_told_and_go_on_when_started_again(town: Town) -> None:
    told = {"coordinator": (signal.SIGINT, 130), "bern": (signal.SIGINT, 130),
            "kyoto": (signal.SIGTERM, 0)}  # fmt: skip
    children: list[psutil.Process] = []
    for name, (what, _) in told.items():
        children += psutil.Process(town.pid(name)).children(recursive=True)
        os.kill(town.pid(name), what)
    for name, (_, status) in told.items():
        assert town.end(name) == status
        assert "Traceback" not in town.log(name)
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert gone
    assert not alive
    town.start_coordinator()
    town.open("bern")
    town.open("kyoto")
    town.wait_for("coordinator", lambda: town.here() == set(town.names))


# --- faults in the middle of things -------------------------------------------------------------

SITES = "cohort.sites=[bern,kyoto,oslo,quito]"
LONG = "training.steps=1500"  # a second or two


def test_a_missing_data_file_fails_the_run_with_site_and_file(town: Town) -> None:
    data = town.site("kyoto") / "data" / "train.csv"
    away = data.rename(data.with_suffix(".away"))
    try:
        done = fedml(
            "run", "submit", "task=breast_cancer", "privacy=record", "privacy.epsilon=0.1",
            "rounds=1", "attempts=1", "cohort.quorum=2", "cohort.deadline=30",
            "cohort.sites=[bern,kyoto]", "evaluation.at_end=false", "--follow",
            profile=town.hub / "operator",
        )  # fmt: skip
    finally:
        away.rename(data)
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "failed: round 1 failed 1 times, the last time without" in line
    assert f"kyoto: {data}: " in line
    assert "No such file or directory" in line
    state = {entry.task: entry.state for entry in town.ledger("kyoto")}
    assert set(state.values()) == {"void"}


def test_kill_the_coordinator_in_training_and_again_on_the_way_to_the_registry(
    town: Town,
) -> None:
    known = len(town.ask(lambda c: c.list_models()))
    run = town.submit("rounds=3", LONG, SITES, "cohort.quorum=4")
    in_training(town, run, town.names)
    town.kill("coordinator")
    town.start_coordinator()
    back = time.monotonic()
    town.until(run, lambda d: len(d.receipts) > 0)
    assert time.monotonic() - back < 10
    town.until(run, lambda d: d.info.detail.startswith("ending: candidate after 3 rounds"))
    town.kill("coordinator")
    town.start_coordinator()
    detail = town.finish(run)
    assert detail.info.state == "done"
    versions = town.ask(lambda c: c.list_models())
    assert len(versions) == known + 1
    [version] = [v for v in versions if v.run == run]
    assert version.version == detail.info.version
    trained = [r for r in detail.receipts if r.kind == "train"]
    assert [(r.round, r.attempt, len(r.counted)) for r in trained] == [
        (1, 1, 4), (2, 1, 4), (3, 1, 4),
    ]  # fmt: skip
    charged_as_told(town, run)
    assert max(c.epsilon for r in trained for c in r.counted) <= 0.5 + 1e-6


def test_kill_a_site_and_a_worker_in_the_middle_of_training(town: Town) -> None:
    run = town.submit("rounds=20", LONG, SITES, "evaluation.at_end=false")
    in_training(town, run, ["bern", "kyoto"])
    town.kill("bern")
    [worker] = [
        child
        for child in psutil.Process(town.pid("kyoto")).children()
        if "fedml.site.worker" in " ".join(child.cmdline())
    ]
    worker.kill()
    town.open("bern")
    town.until(run, lambda d: {str(c.site) for c in last(d).counted} == set(town.names))
    town.ask(lambda c: c.stop_run(run))
    detail = town.finish(run)
    assert "the worker process ended" in detail.receipts[0].missing["kyoto"]
    for receipt in detail.receipts:
        who = {str(counted.site) for counted in receipt.counted} | receipt.missing.keys()
        assert who == {str(site) for site in receipt.asked}
        assert who | receipt.left_out.keys() >= set(town.names)
        assert all(receipt.missing.values())
    charged_as_told(town, run)


def in_training(town: Town, run: str, names: list[str]) -> None:
    """Wait until these sites are at work: a task is reserved in the ledger, and not charged."""

    def look() -> bool:
        return all(
            any(e.run == run and e.state == "reserved" for e in town.ledger(name)) for name in names
        )

    town.wait_for("coordinator", look)


def last(detail: RunDetail) -> Receipt:
    nothing = Receipt(detail.info.id, 1, 1, (), ())
    return detail.receipts[-1] if detail.receipts else nothing


def test_a_site_that_is_shut_out_ends_and_stays_out(town: Town) -> None:
    town.ask(lambda c: c.revoke("quito"))
    assert town.end("quito") == 1
    last = town.log("quito").splitlines()[-1]
    assert last.startswith("error: the certificate of site quito was revoked; join with a new")
    assert "Traceback" not in town.log("quito")
    again = fedml("site", "run", str(town.site("quito")))
    assert "was revoked; join with a new token" in last_words(again)
    time.sleep(1.1)  # certificates count in whole seconds
    done = run(command(*town.joining("quito", town.token("quito"))))
    assert done.returncode == 0, done.stderr
    town.open("quito")
    town.wait_for("coordinator", lambda: town.here() == set(town.names))


def charged_as_told(town: Town, run: str) -> None:
    """Every update that counted was charged before, once; nothing is left reserved."""
    receipts = town.ask(lambda c: c.show_run(RunId(run))).receipts
    for name in town.names:
        told = {
            f"{run}.{r.round}.{r.attempt}.{name}"
            for r in receipts
            for counted in r.counted
            if r.kind == "train" and counted.site == name
        }
        town.wait_for(name, lambda n=name: "reserved" not in states(town, n, run).values())  # type: ignore[misc]
        charged = {task for task, state in states(town, name, run).items() if state == "charged"}
        assert told <= charged
        log = durable.read_log(town.site(name) / "ledger" / "breast_cancer.jsonl")
        charges = Counter(r["task"] for r in log if r["kind"] == "charged" and r["run"] == run)
        assert all(count == 1 for count in charges.values())


def states(town: Town, name: str, run: str) -> dict[str, str]:
    return {e.task: e.state for e in town.ledger(name) if e.run == run and e.part == "train"}
