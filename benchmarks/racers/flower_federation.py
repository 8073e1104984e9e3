"""A Flower app on a coordinator and sites of ours: real programs, mutual TLS on the loopback."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.racers.flower_runtime import SITES, rounds_of
from fedml.cli.demo.federation import Federation, free_ports
from fedml.errors import TaskFailed
from fedml.flower import app as apps
from fedml.protocol.apps import AppPlan
from fedml.protocol.messages import RecipeId
from fedml.protocol.operations import Invitation
from fedml.transport.link import Operations


def play(app: Path, rounds: int) -> list[float]:
    """Return the seconds of each round; raises `TaskFailed` if the run fails."""
    times, found = app.parent / "federation-times", apps.read(app)
    with Federation(app.parent / "federation") as here:
        port, enrolment = map(str, free_ports(2))
        hub = str(here.hub)
        here.command("coordinator", "init", hub, "--port", port, "--enrolment-port", enrolment)
        here.command("coordinator", "allow-app", hub, str(app))
        here.start_coordinator()
        for number in range(SITES):
            name = f"site-{number}"
            token = here.ask(partial(_invite, name)).token
            folder, ports = str(here.site(name)), ("--rest-port", "0", "--grpc-port", "0")
            here.command("site", "join", token, "--dir", folder, *ports)
            node = f"partition-id={number} num-partitions={SITES}"
            rules = ("--privacy", "none", "--node-config", node)
            here.command("site", "allow-app", folder, str(app), *rules)
            here.start(name, "site", "run", folder)
        config = {**found.config, "rounds": rounds, "times": str(times)}
        plan = AppPlan(RecipeId(found.name, found.digest()), config, SITES)
        run = here.ask(lambda c: c.submit(plan.to_json())).id
        here.wait_for(
            "coordinator",
            lambda: here.ask(lambda c: c.show_run(run)).info.state not in ("waiting", "running"),
        )
        info = here.ask(lambda c: c.show_run(run)).info
        if info.state != "done":
            raise TaskFailed(f"{run} {info.state}: {info.detail}")
    return rounds_of(times)


async def _invite(name: str, coordinator: Operations) -> Invitation:
    return await coordinator.invite(name, "site", 600.0)
