"""`fedml coordinator`: make one, run it, let sites and operators in, shut them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedml.cli.profile import JsonOption, ProfileOption, call

if TYPE_CHECKING:
    from fedml.protocol.operations import Invitation, SiteInfo
    from fedml.transport.link import Operations

app = typer.Typer(
    help="Make a coordinator, run it, admit sites.\n\nExample: fedml coordinator init ./hub",
    no_args_is_help=True,
)
Dir = Annotated[Path, typer.Argument(help="The coordinator's folder.")]


@app.command()
def init(
    folder: Dir,
    host: Annotated[str, typer.Option(help="The name sites dial; goes in the certificate.")] = (
        "localhost"
    ),
    bind: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port for sites and operators.")] = 8443,
    enrolment_port: Annotated[int, typer.Option(help="Port for newcomers.")] = 8444,
    health_port: Annotated[
        int, typer.Option(help="Port for /healthz, /readyz and /metrics, on loopback; 0: any.")
    ] = 0,
    registry: Annotated[
        str,
        typer.Option(
            help="MLflow tracking URI, or NAME:PLACE of a package's own; default a SQLite file."
        ),
    ] = "",
) -> None:
    """Make a coordinator: authority, release keys, registry, and a first operator's profile.

    Example: fedml coordinator init ./hub --host hub.example.org --bind 0.0.0.0
    """
    from fedml.cli.console import progress
    from fedml.coordinator.folder import Folder, create
    from fedml.coordinator.settings import Settings

    settings = Settings(
        host=host,
        bind=bind,
        port=port,
        enrolment_port=enrolment_port,
        health_port=health_port,
        registry=registry,
    )
    with progress(f"making {folder}"):
        create(folder, settings)
        Folder.open(folder).registry()  # makes its tables now, not at the first run's end
    typer.echo(f"coordinator in {folder}; operator profile in {folder / 'operator'}")


@app.command()
def run(folder: Dir) -> None:
    """Run a coordinator until it is stopped; started again, it goes on where it was.

    SIGTERM lets it end the rounds that are open, for at most 'drain' seconds; again, or Ctrl-C,
    ends it at once.

    Example: fedml coordinator run ./hub
    """
    from fedml.cli.program import serve_forever
    from fedml.coordinator.regional import Regional
    from fedml.coordinator.service import Service
    from fedml.coordinator.settings import is_region

    serve_forever(Regional(folder) if is_region(folder) else Service(folder))


@app.command()
def allow(
    folder: Dir,
    strategy: Annotated[str, typer.Option(help="A strategy's file and its class, file.py:Class.")],
    name: Annotated[str, typer.Option(help="Default: the class's name in small letters.")] = "",
) -> None:
    """Let runs name a strategy that is in a file; the coordinator keeps a copy, by its digest.

    It runs at the coordinator, so read it first. One that is running hears of it at once.

    Example: fedml coordinator allow ./hub --strategy halfway.py:Halfway
    """
    from fedml.coordinator.allowance import allow_strategy

    told, digest = allow_strategy(folder, strategy, name)
    typer.echo(f"{folder}: runs may name strategy {told} {digest[:12]}")


@app.command("allow-app")
def allow_app(
    folder: Dir,
    app_dir: Annotated[Path, typer.Argument(help="An app's folder, as 'flwr new' makes it.")],
) -> None:
    """Let runs name a Flower app; the coordinator keeps a copy of its code, by its digest.

    Its ServerApp runs at the coordinator, so read it first.

    Example: fedml coordinator allow-app ./hub my-app
    """
    from fedml.cli.flower import known
    from fedml.coordinator.allowance import allow_app as take_in

    name = known(app_dir).name
    typer.echo(f"{folder}: runs may name app {name} {take_in(folder, app_dir, name)[:12]}")


@app.command()
def join(
    folder: Dir,
    token: Annotated[str, typer.Argument(help="What the parent's 'invite --role region' printed.")],
) -> None:
    """Make a coordinator a region: a site to its parent, a coordinator to sites of its own.

    From the next 'fedml coordinator run' on, its sites take part in the parent's runs.

    Example: fedml coordinator join ./north fedml1.eyJ…
    """
    import asyncio

    from fedml.coordinator.regional import join_parent
    from fedml.coordinator.settings import PARENT
    from fedml.identity.certificates import Credentials

    name = asyncio.run(join_parent(folder, token)).name
    parent = Credentials.load(folder / PARENT).address
    typer.echo(f"{folder} is now the region {name} of {parent}; run it, and invite its sites")


@app.command()
def invite(
    name: Annotated[str, typer.Argument(help="The newcomer's name, for ever in its certificate.")],
    role: Annotated[str, typer.Option(help="site, region, operator or viewer.")] = "site",
    hours: Annotated[float, typer.Option(help="How long the token lives.")] = 24.0,
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print a join token, good for one newcomer, once.

    Example: fedml coordinator invite bern --hours 48
    """
    from fedml.cli.console import emit
    from fedml.errors import ConfigError

    if role not in ("site", "region", "operator", "viewer"):
        raise ConfigError(f"role {role!r}: use site, region, operator or viewer")

    async def go(coordinator: Operations) -> Invitation:
        return await coordinator.invite(name, role, hours * 3600)  # type: ignore[arg-type]

    invitation = call(profile, go)
    emit(invitation) if as_json else typer.echo(invitation.token)


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The site or operator to shut out.")],
    profile: ProfileOption = None,
) -> None:
    """Refuse every certificate and token that a name was given so far.

    Example: fedml coordinator revoke bern
    """

    async def go(coordinator: Operations) -> None:
        await coordinator.revoke(name)

    call(profile, go)
    typer.echo(f"{name} is shut out; it may join again with a new token")


@app.command()
def sites(profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """List the sites: who is here, with which data, and what each one serves.

    Example: fedml coordinator sites
    """
    from fedml.cli.console import show, when

    async def go(coordinator: Operations) -> Sequence[SiteInfo]:
        return await coordinator.list_sites()

    show(
        call(profile, go),
        {
            "site": lambda s: s.site,
            "region": lambda s: s.region,
            "connected": lambda s: "yes" if s.connected else "no",
            "seen": lambda s: when(s.seen),
            "device": lambda s: s.device,
            "data": lambda s: "  ".join(f"{d.name} {d.rows} rows" for d in s.datasets),
            "serves": lambda s: "  ".join(f"{m.model}/{m.version} {m.state}" for m in s.serving),
        },
        as_json=as_json,
    )
