"""The systemd units read, keep their promises, and their very commands start and stop a program."""

from __future__ import annotations

import configparser
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml.cli.demo.federation import free_ports
from fedml.coordinator.settings import Settings
from fedml.site.settings import Settings as SiteSettings
from tests.system.page import ROOT
from tests.system.town import Started, fedml

UNITS = ROOT / "deploy/systemd"
PROGRAM = "/opt/fedml/current/bin/fedml"
NAMES = ("fedml-coordinator", "fedml-site")
PROMISED = {
    "User": "fedml",
    "Restart": "always",
    "KillSignal": "SIGTERM",
    "ProtectSystem": "strict",
    "NoNewPrivileges": "true",
    "CapabilityBoundingSet": "",
    "PrivateTmp": "true",
    "StateDirectoryMode": "0700",
    "UMask": "0077",
}


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNITS / f"{name}.service")
    return parser


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_shuts_its_program_in_and_starts_it_again(name: str) -> None:
    service = unit(name)["Service"]
    assert {key: service[key] for key in PROMISED} == PROMISED
    program, *_, folder = service["ExecStart"].split()
    assert program == PROGRAM
    assert service["ReadWritePaths"] == folder == f"/var/lib/{service['StateDirectory']}"
    limits = unit(name)["Unit"]
    again = int(service["RestartSec"]) * int(limits["StartLimitBurst"])
    assert again < int(limits["StartLimitIntervalSec"])  # or it would be started for ever
    assert "EnvironmentFile" not in service
    assert service.get("Environment", "") in ("", "MLFLOW_DISABLE_TELEMETRY=true")


def test_a_coordinator_has_files_for_a_thousand_sites() -> None:
    assert int(unit("fedml-coordinator")["Service"]["LimitNOFILE"]) >= 3500


@pytest.mark.parametrize(
    ("name", "drain"),
    [("fedml-coordinator", Settings().drain), ("fedml-site", SiteSettings("a", "b:1").drain)],
)
def test_a_program_has_time_to_drain_before_it_is_killed(name: str, drain: float) -> None:
    assert int(unit(name)["Service"]["TimeoutStopSec"]) >= drain + 15


@pytest.mark.parametrize("name", NAMES)
def test_systemd_itself_finds_nothing_to_say(name: str, tmp_path: Path) -> None:
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        pytest.skip("needs systemd-analyze")
    text = (UNITS / f"{name}.service").read_text().replace(PROGRAM, sys.executable)
    (tmp_path / f"{name}.service").write_text(text)
    done = subprocess.run(
        [verifier, "verify", "--man=no", str(tmp_path / f"{name}.service")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def started(tmp_path: Path) -> Iterator[dict[str, Started]]:
    programs: dict[str, Started] = {}
    yield programs
    for each in programs.values():
        each.kill()


def start(name: str, folder: Path, output: Path) -> Started:
    program, *arguments, _ = unit(name)["Service"]["ExecStart"].split()
    assert program == PROGRAM
    return Started(output / name, [sys.executable, "-m", "fedml", *arguments, str(folder)])


@pytest.mark.slow
def test_the_very_commands_start_and_sigterm_stops_with_status_zero(
    tmp_path: Path, started: dict[str, Started]
) -> None:
    hub, site = tmp_path / "hub", tmp_path / "site"
    port, newcomers = map(str, free_ports(2))
    made = fedml("coordinator", "init", str(hub), "--port", port, "--enrolment-port", newcomers)
    assert made.returncode == 0, made.stderr
    coordinator = started["hub"] = start("fedml-coordinator", hub, tmp_path / "output")
    coordinator.until_it_says("coordinator ready")
    token = fedml("coordinator", "invite", "bern", profile=hub / "operator").stdout.strip()
    ports = ("--rest-port", "0", "--grpc-port", "0")
    assert fedml("site", "join", token, "--dir", str(site), *ports).returncode == 0
    daemon = started["site"] = start("fedml-site", site, tmp_path / "output")
    daemon.until_it_says('"connected"')
    for program in (daemon, coordinator):
        os.kill(program.process.pid, signal.SIGTERM)
        done = program.end()
        assert done.returncode == 0
        assert "Traceback" not in done.stderr
