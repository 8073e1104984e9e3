"""`fedml run`: submit runs to a coordinator, follow and stop them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedml.cli.profile import JsonOption, ProfileOption, call

if TYPE_CHECKING:
    from fedml.protocol.operations import RunDetail, RunInfo
    from fedml.transport.link import Operations

app = typer.Typer(
    help="Submit runs, follow them, stop them.\n\n"
    "Example: fedml run submit task=breast_cancer --follow",
    no_args_is_help=True,
)
Run = Annotated[str, typer.Argument(help="The run's id, as 'fedml run list' shows it.")]


@app.command()
def submit(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Hydra overrides, as task=heart_disease rounds=20.")
    ] = None,
    config_name: Annotated[str, typer.Option("--config", help="The config to start from.")] = "run",
    config_dir: Annotated[Path | None, typer.Option(help="A folder of your own configs.")] = None,
    follow: Annotated[bool, typer.Option(help="Stay until the run has ended.")] = False,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compose a plan with Hydra, check it, and submit it.

    Example: fedml run submit task=breast_cancer strategy=fedadam privacy=record privacy.epsilon=3
    """
    from fedml.cli.compose import compose_plan
    from fedml.cli.console import emit

    plan = compose_plan(config_name, overrides or [], config_dir)

    async def go(coordinator: Operations) -> RunInfo:
        info = await coordinator.submit(plan.to_json())
        if not as_json:
            typer.echo(f"submitted {info.id}")
        return await _follow(coordinator, info) if follow else info

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
        return await _follow(coordinator, detail.info)

    last = call(profile, go)
    if as_json:
        emit(last)
    _judge(last)


async def _follow(coordinator: Operations, info: RunInfo) -> RunInfo:
    from fedml.cli.console import progress

    last = info
    with progress(_line(info)) as say:
        async for last in coordinator.watch_run(info.id):
            say(_line(last))
    return last


def _line(info: RunInfo) -> str:
    return f"{info.id}  {info.state}  {info.round}/{info.rounds} rounds  {info.detail}"


def _judge(info: RunInfo) -> None:
    if info.state == "failed":
        from fedml.cli.console import fail

        fail(f"{info.id} failed: {info.detail}")


@app.command("list")
def list_(profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """List all runs.

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
            "rounds": lambda r: f"{r.round}/{r.rounds}",
            "version": lambda r: r.version or "",
            "scores": lambda r: scores(r.scores.items()),
            "submitted": lambda r: when(r.submitted),
        },
        as_json=as_json,
    )


@app.command("show")
def show_(run: Run, profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """Show a run with its receipts: who was asked in each round, who counted, who not and why.

    Example: fedml run show breast_cancer-1
    """
    from fedml.cli.console import emit, scores, show
    from fedml.protocol.messages import RunId

    async def go(coordinator: Operations) -> RunDetail:
        return await coordinator.show_run(RunId(run))

    detail = call(profile, go)
    if as_json:
        emit(detail)
        return
    typer.echo(_line(detail.info))
    show(
        detail.receipts,
        {
            "round": lambda r: r.round if r.attempt == 1 else f"{r.round} (attempt {r.attempt})",
            "kind": lambda r: r.kind,
            "asked": lambda r: len(r.asked),
            "counted": lambda r: "  ".join(
                f"{c.site} {c.weight:g} eps {c.epsilon:.2f}" for c in r.counted
            ),
            "missing": lambda r: "; ".join(f"{site}: {why}" for site, why in r.missing.items()),
            "scores": lambda r: scores(r.scores.items()),
            "model": lambda r: r.model[:12],
        },
        as_json=False,
    )


@app.command()
def stop(run: Run, profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """Stop a run; the rounds that are committed stay.

    Example: fedml run stop breast_cancer-1
    """
    from fedml.cli.console import emit
    from fedml.protocol.messages import RunId

    async def go(coordinator: Operations) -> RunInfo:
        return await coordinator.stop_run(RunId(run))

    info = call(profile, go)
    emit(info) if as_json else typer.echo(f"stopping {info.id}")
