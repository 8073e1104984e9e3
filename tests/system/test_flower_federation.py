"""Flower apps on a coordinator and two sites over mTLS: real processes, and kill -9 among them."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedml.cli.demo.federation import free_ports
from fedml.protocol.messages import RunId
from tests.system.page import ROOT
from tests.system.town import Start, Started, Town, command, complaint, fedml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
QUICKSTART = ROOT / "tests/flower/quickstart"


class Pair(Town):
    """A coordinator and two sites that run Flower apps, and have no dataset of ours."""

    def found(self) -> None:
        port, enrolment = free_ports(2)
        self.command(
            "coordinator", "init", str(self.hub),
            "--port", str(port), "--enrolment-port", str(enrolment),
        )  # fmt: skip
        self.settle(heartbeat=0.5, grace=5.0)
        self.start_coordinator()
        self.names = ["bern", "chur"]
        self.commands([self.joining(name, self.token(name)) for name in self.names])

    def allow(self, app: Path, *names: str) -> None:
        self.command("coordinator", "allow-app", str(self.hub), str(app))
        for name in names:
            where = f"partition-id={self.names.index(name)} num-partitions=2"
            self.command(
                "site", "allow-app", str(self.site(name)), str(app),
                "--privacy", "none", "--node-config", where,
            )  # fmt: skip

    def open_all(self) -> None:
        for name in self.names:
            if not self.is_running(name):
                self.open(name)
        self.wait_for("coordinator", lambda: self.here() == set(self.names))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    a_pair = Pair(tmp_path_factory.mktemp("pair"))
    with a_pair:
        a_pair.found()
        for app in (QUICKSTART,):
            a_pair.allow(app, *a_pair.names)
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
