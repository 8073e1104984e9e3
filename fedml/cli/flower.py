"""`fedml flower`: Flower apps as they are, run by us."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedml.cli.console import emit, progress
from fedml.cli.profile import JsonOption, ProfileOption, call
from fedml.errors import ConfigError

if TYPE_CHECKING:
    from fedml.flower.app import App
    from fedml.flower.grid import Exchange
    from fedml.flower.simulation import Metrics, Outcome, Scores, Setup
    from fedml.protocol.operations import RunDetail
    from fedml.transport.link import Operations

_LEAST = 2  # sites that a run waits for
app = typer.Typer(
    help="Run Flower apps as they are.\n\nExample: fedml flower run my-app", no_args_is_help=True
)


@app.command()
def run(
    app_dir: Annotated[
        Path | None, typer.Argument(help="An app's folder, as 'flwr new' makes it.")
    ] = None,
    sites: Annotated[
        int | None,
        typer.Option(
            "--num-supernodes",
            "--sites",
            help="How many sites; 10, unless the app says it, or 2 of a federation.",
        ),
    ] = None,
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            "--run-config", "-c", help="Settings: 'key=value key=\"text\"', or a TOML file."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="What chance follows from.")] = 0,
    folder: Annotated[
        Path | None, typer.Option(help="Where the run is kept; by default outputs/DATE/TIME.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the interrupted run in this folder.")
    ] = None,
    keep_every: Annotated[
        float, typer.Option(help="Seconds of work that a crash may cost; 0: none.")
    ] = 1.0,
    federation: Annotated[
        bool, typer.Option("--federation", help="Run it on your profile's coordinator and sites.")
    ] = False,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run a Flower app, its ServerApp and its ClientApp unchanged: on this machine, unless told.

    Example: fedml flower run my-app --num-supernodes 10 --run-config "num-server-rounds=5"
    """
    with _flower():
        from fedml.flower import simulation
    if federation:
        if resume or folder:
            raise ConfigError(
                "--federation keeps the run at the coordinator: no --resume, --folder"
            )
        return _on_federation(
            app_dir or Path(), tuple(run_config or ()), sites, seed, profile, as_json=as_json
        )
    if resume is not None:
        if app_dir or sites is not None or run_config or folder or seed:
            raise ConfigError("--resume takes everything from the run's folder; name nothing else")
        place, setup = resume, simulation.begun(resume)
    else:
        setup = simulation.prepare(app_dir or Path(), tuple(run_config or ()), sites, seed)
        place = folder or _fresh()
        if (place / "run.json").exists():
            raise ConfigError(f"{place} has a run already; --resume {place}, or another --folder")
    _simulate(setup, place, keep_every, as_json=as_json)


def _simulate(setup: Setup, place: Path, keep_every: float, *, as_json: bool) -> None:
    """Play an app on this machine, and show what it came to."""
    from fedml.flower import simulation

    with progress(f"{place}: {setup.sites} sites", lines=False) as say, _aside():
        try:
            outcome = simulation.play(setup, place, least=keep_every, tell=_teller(say))
        except KeyboardInterrupt:
            typer.secho(f"go on with: fedml flower run --resume {place}", err=True)
            raise
    if as_json:
        emit({**outcome.shown(), "folder": str(place)})
    else:
        _show(outcome, place)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Where the app goes; a new or empty folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Hydra overrides, as for 'fedml run submit'.")
    ] = None,
    config_name: Annotated[str, typer.Option("--config", help="The config to start from.")] = "run",
    config_dir: Annotated[Path | None, typer.Option(help="A folder of your own configs.")] = None,
) -> None:
    """Write a plan of ours, strategy, recipe and all, as a Flower app for Flower's own runtime.

    Example: fedml flower export my-app task=breast_cancer strategy=fedadam cohort.quorum=2
    """
    from fedml.cli.compose import compose_plan

    with _flower():
        from fedml.flower.export import write
    plan = compose_plan(config_name, overrides or [], config_dir)
    write(plan, folder)
    typer.echo(
        f"{folder}: {plan.model}, {plan.rounds} rounds; name the nodes' files with "
        "--run-config \"train='…' held-out='…'\""
    )


def known(app_dir: Path) -> App:
    """Return the app in a folder; raises `ConfigError` if there is none, or no Flower."""
    with _flower():
        from fedml.flower import app as apps
    return apps.read(app_dir)


def _on_federation(
    app_dir: Path,
    words: tuple[str, ...],
    sites: int | None,
    seed: int,
    profile: Path | None,
    *,
    as_json: bool,
) -> None:
    """Submit an app, follow it to its end, and show what it came to."""
    from fedml.cli.console import fail
    from fedml.cli.run import follow_
    from fedml.flower import app as apps
    from fedml.protocol.apps import AppPlan
    from fedml.protocol.messages import RecipeId

    found = known(app_dir)
    config = apps.overridden(found.config, words)
    least = _LEAST if sites is None else sites  # an app speaks of simulated ones only
    plan = AppPlan(RecipeId(found.name, found.digest()), config, least, seed)

    async def go(coordinator: Operations) -> RunDetail:
        info = await coordinator.submit(plan.to_json())
        typer.echo(f"submitted {info.id}; follow it with: fedml run watch {info.id}", err=True)
        await follow_(coordinator, info)
        return await coordinator.show_run(info.id)

    detail = call(profile, go)
    info, result = detail.info, json.loads(detail.result or "{}")
    if info.state == "done" and not as_json:
        scores = {part: _by_round(result, part) for part in ("train", "evaluate", "server")}
        _rounds(scores)
        for site, reason in _silences(detail):
            typer.secho(f"no reply: {reason} (site {site})", fg="yellow", err=True)
        typer.echo(f"{info.id}: {info.round} exchanges; {info.detail} at the coordinator")
    if as_json:
        emit({**result, "run": info.id, "state": info.state, "detail": info.detail})
    if info.state != "done":
        fail(f"{info.id} {info.state}: {info.detail}")


def _by_round(result: dict[str, dict[str, Metrics]], part: str) -> Scores:
    return {int(number): metrics for number, metrics in result.get(part, {}).items()}


def _silences(detail: RunDetail) -> list[tuple[str, str]]:
    """Return the sites that did not reply, each with a reason once."""
    found = {(str(site), why) for r in detail.receipts for site, why in r.missing.items()}
    return sorted(found)


@contextlib.contextmanager
def _flower() -> Iterator[None]:
    """Say how to get Flower if it is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flwr":
            raise
        raise ConfigError(
            "flwr is not installed, and this command needs it; pip install "
            "'fedml-consortium[flower]'"
        ) from error


@contextlib.contextmanager
def _aside() -> Iterator[None]:
    """Let what an app prints go to standard error; Flower's log says only what is wrong."""
    import logging
    import os

    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.DEBUG if os.environ.get("FEDML_VERBOSE") else logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)


def _fresh() -> Path:
    """Return a folder named for now, as Hydra names them."""
    import time

    return Path(time.strftime("outputs/%Y-%m-%d/%H-%M-%S"))


def _teller(say: Callable[[str], None]) -> Callable[[Exchange], None]:
    counts = dict[str, int]()

    def tell(exchange: Exchange) -> None:
        kind = exchange.kind
        counts[kind] = counts.get(kind, 0) + 1
        good = exchange.asked - len(exchange.failures)
        say(f"{kind} {counts[kind]}: {good} of {exchange.asked} sites")

    return tell


def _show(outcome: Outcome, folder: Path) -> None:
    """Print each round's metrics in a line, what failed, and where it is all kept."""
    _rounds({"train": outcome.train, "evaluate": outcome.evaluate, "server": outcome.server})
    for reason, sites in outcome.failures.items():
        named = ", ".join(map(str, sorted(sites)))
        typer.secho(
            f"failed: {reason} (site {named}; see {folder}/errors.log)", fg="yellow", err=True
        )
    rounds = max((*outcome.train, *outcome.evaluate, *outcome.server), default=0)
    pace = f", once warm {1000 * outcome.pace:.1f} ms each" if rounds and outcome.pace else ""
    messages = sum(exchange.asked for exchange in outcome.exchanges)
    done = f"{rounds} rounds" if rounds else f"{messages} messages"
    kept = f"{folder}/{outcome.model}" if outcome.model else f"{folder}, without a model"
    typer.echo(f"{done} in {outcome.seconds:.2f} s{pace}; kept in {kept}")


def _rounds(columns: Mapping[str, Scores]) -> None:
    for number in sorted({number for scores in columns.values() for number in scores}):
        parts = (_line(name, scores, number) for name, scores in columns.items())
        typer.echo("  ".join([f"round {number}", *(part for part in parts if part)]))


def _line(name: str, scores: Scores, number: int) -> str:
    metrics = scores.get(number, {})
    figures = [f"{key} {_figure(value)}" for key, value in metrics.items()]
    return f"{name}: {', '.join(figures)}" if figures else ""


def _figure(value: float | Sequence[float]) -> str:
    if isinstance(value, Sequence):
        return f"[{' '.join(f'{each:.4g}' for each in value)}]"
    return f"{value:.4g}"
