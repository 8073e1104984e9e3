"""`fedml run`: submit runs to a coordinator, follow them, stop them and let them go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedml.cli.profile import JsonOption, ProfileOption, call, load

if TYPE_CHECKING:
    from fedml.protocol.operations import RunDetail, RunInfo
    from fedml.transport.link import Operations

app = typer.Typer(
    help="Submit runs, follow them, stop them, resume them.\n\n"
    "Example: fedml run submit task=breast_cancer --follow",
    no_args_is_help=True,
)
Run = Annotated[str, typer.Argument(help="The run's id, as 'fedml run list' shows it.")]
FollowOption = Annotated[bool, typer.Option(help="Stay until the run has ended.")]


@app.command()
def submit(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Hydra overrides, as task=heart_disease rounds=20.")
    ] = None,
    config_name: Annotated[str, typer.Option("--config", help="The config to start from.")] = "run",
    config_dir: Annotated[Path | None, typer.Option(help="A folder of your own configs.")] = None,
    at: Annotated[
        str, typer.Option(help="Start no earlier: ISO 8601, local time or with an offset.")
    ] = "",
    follow: FollowOption = False,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compose a plan with Hydra, check it, and submit it.

    Example: fedml run submit task=breast_cancer strategy=fedadam privacy=record privacy.epsilon=3
    """
    from fedml.cli.compose import compose_plan
    from fedml.cli.console import emit, moment

    starts = moment(at, time.time()) if at else 0.0
    plan = compose_plan(config_name, overrides or [], config_dir)

    async def go(coordinator: Operations) -> RunInfo:
        info = await coordinator.submit(plan.to_json(), starts)
        if not as_json:
            place = _place(info)
            typer.echo(f"submitted {info.id}" + (f", {info.state}: {place}" if place else ""))
        return await follow_(coordinator, info) if follow else info

    last = call(profile, go)
    if as_json:
        emit(last)
    _judge(last)


@app.command()
def watch(run: Run, profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """Follow a run until it ends; the exit status is 1 if it fails.

    Example: fedml run watch breast_cancer-1
    """
    from fedml.cli.console import emit
    from fedml.protocol.messages import RunId

    async def go(coordinator: Operations) -> RunInfo:
        detail = await coordinator.show_run(RunId(run))
        return await follow_(coordinator, detail.info)

    last = call(profile, go)
    if as_json:
        emit(last)
    _judge(last)


async def follow_(coordinator: Operations, info: RunInfo) -> RunInfo:
    """Show how a run goes until it ends; return its last state."""
    from fedml.cli.console import progress

    last = info
    with progress(_line(info)) as say:
        async for last in coordinator.watch_run(info.id):
            say(_line(last))
    return last


def _line(info: RunInfo) -> str:
    more = _place(info) or info.detail
    return f"{info.id}  {info.state}  {_progress(info)}  {more}".rstrip()


def _progress(info: RunInfo) -> str:
    """Return how far a run is; nobody knows how often a Flower app will ask."""
    return f"{info.round}/{info.rounds} rounds" if info.rounds else f"{info.round} exchanges"


def _place(info: RunInfo) -> str:
    """Return what a run waits for that has no place yet: its hour, or those before it."""
    from fedml.cli.console import when

    if info.state == "scheduled":
        return f"starts {when(info.starts)} UTC"
    return info.detail if info.state == "queued" else ""


def _judge(info: RunInfo) -> None:
    if info.state == "failed":
        from fedml.cli.console import fail

        fail(f"{info.id} failed: {info.detail}")


@app.command("list")
def list_(profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """List all runs, those that are queued or scheduled with their place.

    Example: fedml run list --json
    """
    from fedml.cli.console import scores, show, when

    async def go(coordinator: Operations) -> Sequence[RunInfo]:
        return await coordinator.list_runs()

    show(
        call(profile, go),
        {
            "run": lambda r: r.id,
            "state": lambda r: r.state,
            "place": _place,
            "rounds": lambda r: f"{r.round}/{r.rounds}" if r.rounds else f"{r.round}",
            "version": lambda r: r.version or "",
            "scores": lambda r: scores(r.scores.items()),
            "submitted": lambda r: when(r.submitted),
        },
        as_json=as_json,
    )


@app.command("show")
def show_(run: Run, profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """Show a run with its receipts: who was asked in each round, who counted, who not and why.

    Their seals are verified against your profile's authority; the exit status is 1 if one is
    broken. An end that was cut off shows only to those who noted the head that was told before.

    Example: fedml run show breast_cancer-1
    """
    from dataclasses import asdict

    from fedml.cli.console import emit, fail
    from fedml.cli.receipts import lines
    from fedml.errors import Untrusted
    from fedml.identity.receipts import verify
    from fedml.protocol.messages import RunId

    async def go(coordinator: Operations) -> RunDetail:
        return await coordinator.show_run(RunId(run))

    detail = call(profile, go)
    head = alarm = ""
    try:
        head = verify(detail, load(profile).ca)
    except Untrusted as error:
        alarm = str(error)
    if as_json:
        emit({**asdict(detail), "head": head, "verified": not alarm, "alarm": alarm})
    else:
        for line in (_line(detail.info), *lines(detail)):
            typer.echo(line)
    if alarm:
        fail(alarm)
    if not as_json:
        typer.echo(f"receipts verified, head {head}" if detail.receipts else "no receipts yet")


@app.command()
def stop(run: Run, profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """Stop a run; the rounds that are committed stay, and 'fedml run resume' goes on from them.

    Example: fedml run stop breast_cancer-1
    """
    from fedml.cli.console import emit
    from fedml.protocol.messages import RunId

    async def go(coordinator: Operations) -> RunInfo:
        return await coordinator.stop_run(RunId(run))

    info = call(profile, go)
    if as_json:
        emit(info)
    elif info.state in ("done", "failed", "stopped"):
        typer.echo(_line(info))
    else:
        typer.echo(f"stopping {info.id}")


@app.command()
def resume(
    run: Run,
    follow: FollowOption = False,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a run that was stopped or has failed go on from its last committed round.

    Example: fedml run resume breast_cancer-1
    """
    from fedml.cli.console import emit
    from fedml.protocol.messages import RunId

    async def go(coordinator: Operations) -> RunInfo:
        info = await coordinator.resume_run(RunId(run))
        if not as_json:
            typer.echo(f"resumed {info.id}")
        return await follow_(coordinator, info) if follow else info

    last = call(profile, go)
    if as_json:
        emit(last)
    _judge(last)
