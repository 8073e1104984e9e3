"""`fedml run`: submit runs to a coordinator, follow and stop them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedml.cli.profile import ProfileOption, call

app = typer.Typer(help="Submit runs, follow them, stop them.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for scripts.")]


@app.command()
def submit(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Hydra overrides, as task=heart_disease rounds=20.")
    ] = None,
    config_name: Annotated[str, typer.Option("--config", help="Which config to start from.")] = "run",
    config_dir: Annotated[Path | None, typer.Option(help="Your own Hydra configs.")] = None,
    follow: Annotated[bool, typer.Option(help="Stay until the run has ended.")] = False,
    profile: ProfileOption = None,
    as_json: Json = False,
) -> None:
    """Compose a plan with Hydra, check it, and submit it.

    Example: fedml run submit task=breast_cancer strategy=fedadam privacy=record privacy.epsilon=3
    """
    from fedml.cli.compose import compose_plan
    from fedml.cli.console import emit, fail
    from fedml.protocol.operations import RunInfo
    from fedml.transport.link import Operations

    plan = compose_plan(config_name, overrides or [], config_dir)

    async def go(coordinator: Operations) -> RunInfo:
        info = await coordinator.submit(plan.to_json())
        if as_json or not follow:
            emit(info) if as_json else typer.echo(f"submitted {info.id}")
        return await _follow(coordinator, info, as_json) if follow else info

    last = call(profile, go)
    if follow and last.state == "failed":
        fail(f"{last.id} failed: {last.detail}")


async def _follow(coordinator, info, as_json):  # type: ignore[no-untyped-def]
    raise AssertionError


@app.command("list")
def list_(profile: ProfileOption = None, as_json: Json = False) -> None:
    """List all runs.

    Example: fedml run list --json
    """
    from fedml.cli.console import scores, show, when
    from fedml.protocol.operations import RunInfo

    def row(read):  # type: ignore[no-untyped-def]
        return read

    columns = [
        ("run", lambda r: r.id),
        ("state", lambda r: r.state),
        ("rounds", lambda r: f"{r.round}/{r.rounds}"),
        ("version", lambda r: r.version or ""),
        ("scores", lambda r: scores(r.scores.items())),
        ("submitted", lambda r: when(r.submitted)),
    ]
    _ = RunInfo, row
    show(call(profile, lambda c: c.list_runs()), columns, as_json=as_json)
