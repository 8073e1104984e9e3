"""A small federation that is made to be hurt: real programs, mutual TLS, real files, two sites.

Each program is started with a file of strikes of its own (`fedml.failpoints`), so it can be
armed while it is under way. `Fleet` starts, arms, kills and starts again; what must hold
afterwards is in `contract`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from fedml import durable, failpoints
from fedml import settings as files
from fedml.cli.demo.federation import Federation, free_ports
from fedml.coordinator.folder import create
from fedml.coordinator.settings import Settings
from fedml.identity.certificates import DAY, Authority, Credentials, new_key_and_csr
from fedml.learning.recipe import identify
from fedml.params import Params, encode
from fedml.privacy.chain import Entry, read
from fedml.protocol.messages import Privacy, RunId, SiteId, Training
from fedml.protocol.operations import RunDetail
from fedml.rounds import Cohort, Evaluation, Gate, Plan
from fedml.site import settings as site_settings
from fedml.strategies import FedAvg
from tests.faults.light import FEATURES, Light, Small

ROOT = Path(__file__).parents[2]
COORDINATOR = "coordinator"
SITES = ("bern", "oslo")
TARGETS = {"light": "tests.faults.light:Light", "small": "tests.faults.light:Small"}
RECIPES = {"light": Light(), "small": Small()}
TRAIN, HELD_OUT = 24, 12
_NONE: Mapping[str, str] = {}
HEARTBEAT, GRACE = 0.4, 1.5
PATIENCE = 60.0  # seconds within which whatever is awaited must come about
ROUNDS = 3


def plan(
    seed: int,
    *,
    private: bool = False,
    minted: bool = False,
    rounds: int = ROUNDS,
    recipe: str = "",
    deadline: float = 30.0,
) -> Plan:
    """Return a run of `rounds` and an evaluation, which asks both sites each time.

    Unless it is to be `minted`, its gate cannot be passed: the press takes longer than the rest.
    """
    recipe = recipe or ("small" if private else "light")
    privacy = Privacy("record", 5.0, 1e-5, rounds=rounds, evaluation_epsilon=0.5)
    return Plan(
        model=recipe,
        recipe=identify(recipe, TARGETS),
        dataset="rows",
        strategy=FedAvg(),
        # all rows at once under privacy: its cost has a formula, and takes no second to find
        training=Training(lr=0.05, steps=2, batch_size=0 if private else 8),
        privacy=privacy if private else Privacy(),
        cohort=Cohort(quorum=len(SITES), deadline=deadline, sites=tuple(map(SiteId, SITES))),
        evaluation=Evaluation(at_end=True),
        gates=() if minted else (Gate(metric="accuracy", at_least=2.0),),
        rounds=rounds,
        seed=seed,
        attempts=50,  # a site may be away longer than its grace, again and again
        patience=PATIENCE,
    )


@dataclass(frozen=True)
class Program:
    """What is run under a name, and the file that arms it."""

    arguments: tuple[str, ...]
    strikes: Path


class Fleet(Federation):
    """One coordinator and two sites; leave the `with` block and all are gone."""

    def __init__(
        self, folder: Path, sites: tuple[str, ...] = SITES, runs_at_once: int = 4, **settings: float
    ) -> None:
        super().__init__(folder)
        self._policy = _policy(len(sites), runs_at_once)
        self.sites, self._settings = sites, {"heartbeat": HEARTBEAT, "grace": GRACE, **settings}
        self.is_sound = True  # until a test has failed that hurt it
        self.first: dict[str, Path] = {}  # what comes first on a program's Python path
        self._journal: dict[str, list[Mapping[str, Any]]] = {}
        self._seen = 0  # bytes of the journal
        self._read: dict[str, int] = {}  # how much of each log was looked at
        self.port, self.enrolment_port = free_ports(2)

    def __enter__(self) -> Self:
        return self

    @property
    def programs(self) -> tuple[str, ...]:
        """All that runs, by name."""
        return (COORDINATOR, *self.sites)

    def above(self, site: str) -> Path:
        """Return the folder of the coordinator that a site dials."""
        return self.hub

    # --- its making -----------------------------------------------------------------------------

    def found(self, addresses: Mapping[str, str] = _NONE) -> Fleet:
        """Make all folders and start all programs; a site in `addresses` dials what is there."""
        self.make(addresses)
        for name in self.programs:
            self.launch(name)
        self.until_all_are_here()
        return self

    def make(self, addresses: Mapping[str, str] = _NONE) -> None:
        """Make all folders; nothing is started."""
        register(self.folder / "packages")
        (self.folder / "strikes").mkdir()
        ports = {"port": self.port, "enrolment_port": self.enrolment_port}
        create(self.hub, Settings(**ports, **self._settings))  # type: ignore[arg-type]
        for name in self.sites:
            self._admit(name, addresses.get(name, f"localhost:{self.port}"))

    def _admit(self, name: str, address: str) -> None:
        """Make a site's folder as `fedml site join` and an operator's own editor do."""
        folder = self.site(name)
        self.certify(name, address, time.time())
        files.write(site_settings.Settings(name, address, rest_port=0, grpc_port=0),
                    folder / "site.toml")  # fmt: skip
        root = self.above(name) / "releases" / "metadata" / "1.root.json"
        durable.replace(folder / "trust" / "root.json", root.read_bytes())
        durable.replace(folder / "policy.toml", self._policy.encode())
        for part, count in (("train", TRAIN), ("held_out", HELD_OUT)):
            durable.replace(folder / f"{part}.csv", rows(f"{name} {part}", count).encode())

    def certify(self, name: str, address: str, issued: float, life: float = 30 * DAY) -> None:
        """Give a site a new key and certificate, which lives `life` seconds from `issued` on."""
        authority = Authority.load(self.above(name) / "ca")
        key, csr = new_key_and_csr(name)
        certificate = authority.issue(csr, name, "site", issued, days=life / DAY)
        papers = Credentials(address, authority.certificate, certificate, key)
        papers.save(self.site(name) / "identity")

    # --- its programs ---------------------------------------------------------------------------

    def program(self, name: str) -> Program:
        """Return what runs under a name."""
        strikes = self.folder / "strikes" / name
        if name == COORDINATOR:
            return Program(("coordinator", "run", str(self.hub)), strikes)
        return Program(("site", "run", str(self.site(name))), strikes)

    def launch(self, name: str, **environment: str) -> None:
        """Start a program, or start it again."""
        program = self.program(name)
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "fedml", *program.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**self.environment(name), **environment},
            )

    def relaunch(self, name: str, **environment: str) -> None:
        """Kill a program and start it again."""
        self.kill(name)
        self.launch(name, **environment)

    def environment(self, name: str) -> dict[str, str]:
        """Return the environment of a program: fail points, and the recipe's package."""
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(
                str(path)
                for path in (self.first.get(name), ROOT, self.folder / "packages")
                if path is not None
            ),
            failpoints.VARIABLE: f"@{self.program(name).strikes}",
        }

    def arm(self, name: str, strikes: str) -> None:
        """Have a program, which may be under way, struck."""
        path = self.program(name).strikes
        draft = path.with_name(f".{name}")
        draft.write_text(strikes)
        draft.rename(path)

    def is_armed(self, name: str) -> bool:
        """True until what a program was armed with has happened."""
        return self.program(name).strikes.exists()

    def disarm(self, name: str) -> None:
        """Have nothing happen any more."""
        self.program(name).strikes.unlink(missing_ok=True)

    def slay(self, name: str) -> None:
        """Send SIGKILL to a program; `bury` waits for its end."""
        self._processes[name].kill()

    def tell_to_stop(self, name: str) -> None:
        """Send SIGTERM to a program; `has_stopped` waits for its end."""
        self._processes[name].terminate()

    def has_stopped(self, name: str) -> int:
        """Wait until a program that was told to stop is no more; return its status."""
        return self._processes.pop(name).wait(PATIENCE)

    def bury(self, name: str) -> None:
        """Wait until a program that was killed is no more."""
        assert self._processes.pop(name).wait(PATIENCE) == -signal.SIGKILL, self.log(name)[-2000:]

    def until(self, test: Callable[[], bool], seconds: float) -> bool:
        """Wait until `test` holds, or for so many seconds; return whether it does."""
        end = time.monotonic() + seconds
        while not (true := test()) and time.monotonic() < end:
            time.sleep(0.02)
        return true

    def pid(self, name: str) -> int:
        """Return a program's process id."""
        return self._processes[name].pid

    def worker(self, site: str) -> psutil.Process | None:
        """Return a site's worker process, if it has one."""
        with suppress(psutil.Error):
            for child in psutil.Process(self.pid(site)).children():
                if "fedml.site.worker" in " ".join(child.cmdline()):
                    return child
        return None

    def here(self) -> set[str]:
        """Return the sites whose stream is open."""
        return {str(info.site) for info in self.ask(lambda c: c.list_sites()) if info.connected}

    def until_all_are_here(self) -> None:
        """Wait until the coordinator has every site."""
        self.wait_for(COORDINATOR, lambda: self.here() >= set(self.sites))

    def log(self, name: str) -> str:
        """Return what a program said so far."""
        return (self.folder / "logs" / f"{name}.log").read_text(errors="replace")

    def news(self, name: str) -> str:
        """Return what a program said since this was asked last."""
        text = self.log(name)
        start, self._read[name] = self._read.get(name, 0), len(text)
        return text[start:]

    # --- its runs -------------------------------------------------------------------------------

    def submit(self, a_plan: Plan) -> RunId:
        """Submit a run; its first parameters are made here, which saves the press its seconds."""
        number = 1 + len(self.ask(lambda c: c.list_runs()))
        path = self.hub / "press" / f"{a_plan.model}-{number}.first.safetensors"
        durable.replace(path, *encode({"": first_params(a_plan)}))
        return self.ask(lambda c: c.submit(a_plan.to_json())).id

    def show(self, run: RunId) -> RunDetail:
        """Return a run as an operator sees it."""
        return self.ask(lambda c: c.show_run(run))

    def journal(self, run: RunId) -> list[Mapping[str, Any]]:
        """Return what is on the coordinator's disk about a run, without asking it."""
        with (self.hub / "journal.jsonl").open("rb") as file:
            file.seek(self._seen)
            while (line := file.readline()).endswith(b"\n"):
                self._seen += len(line)
                record = json.loads(line.partition(b" ")[2])
                self._journal.setdefault(record["entry"]["run"], []).append(record)
        return self._journal.get(run, [])

    def has_ended(self, run: RunId) -> bool:
        """True if the end of a run is on the disk."""
        return any(record["kind"] == "Ended" for record in self.journal(run))

    def finish(self, run: RunId) -> RunDetail:
        """Wait for the end of a run, and return it; no program may end meanwhile."""

        def look() -> bool:
            for name in self.programs:
                assert self.is_running(name), f"{name} ended: {self.log(name)[-1000:]}"
            return self.has_ended(run)

        assert self.until(look, PATIENCE), f"no end within {PATIENCE:g} s: {self.show(run).info}"
        return self.ended(run)

    def ended(self, run: RunId) -> RunDetail:
        """Return a run whose end is on the disk, once the coordinator has seen it there too."""
        self.until(lambda: self.show(run).info.state != "running", PATIENCE)
        return self.show(run)

    def ledger(self, site: str) -> tuple[Entry, ...]:
        """Return a site's ledger as it is on its disk."""
        path = self.site(site) / "ledger" / "rows.jsonl"
        return read(path) if path.exists() else ()


def register(packages: Path) -> None:
    """Make a package, beside ours on the path, whose entry point is the light recipe."""
    info = packages / "fedml_light-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fedml-light\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in TARGETS.items()]
    (info / "entry_points.txt").write_text("\n".join(["[fedml.recipes]", *lines, ""]))


def first_params(a_plan: Plan) -> Params:
    """Return the parameters that a run starts from."""
    return Params(RECIPES[a_plan.recipe.name].build().state_dict())


def rows(seed: str, count: int) -> str:
    """Return a file of rows, which `seed` decides."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        features = [draw.gauss(0, 1) for _ in range(FEATURES)]
        lines.append(",".join(f"{value:.6f}" for value in features) + f",{int(sum(features) > 0)}")
    return "\n".join(lines) + "\n"


def _policy(sites: int, runs_at_once: int) -> str:
    digests = {name: identify(name, TARGETS).digest for name in TARGETS}
    recipes = "".join(f'[recipes.{name}]\ndigest = "{it}"\n' for name, it in digests.items())
    return (
        f"minimum_cohort = {min(sites, 2)}\nruns_at_once = {runs_at_once}\n{recipes}"
        f'[datasets.rows]\ntrain = "train.csv"\nheld_out = "held_out.csv"\nrows = {TRAIN}\n'
        'recipes = ["light", "small"]\nprivacy = "none"\nepsilon = 1e6\ndelta = 1e-5\n'
    )
