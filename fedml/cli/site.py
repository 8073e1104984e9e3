"""`fedml site`: join a federation, run the daemon, look at one's own policy and ledger."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedml.cli.profile import JsonOption
from fedml.protocol.messages import PrivacyMode

if TYPE_CHECKING:
    from fedml.identity.certificates import Identity
    from fedml.site.settings import Settings

app = typer.Typer(
    help="Join, train under your own policy, serve.\n\nExample: fedml site join TOKEN --dir ./bern",
    no_args_is_help=True,
)
Dir = Annotated[Path, typer.Argument(help="The site's folder.")]


@app.command()
def join(
    token: Annotated[str, typer.Argument(help="What 'fedml coordinator invite' printed.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where the site's files go.")] = Path(
        "site"
    ),
    rest_port: Annotated[
        int | None, typer.Option(help="REST port of the endpoint; 8400 unless it had another.")
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="gRPC port of the endpoint; 8401 unless it had another.")
    ] = None,
) -> None:
    """Join a federation: make a key, get a certificate, write a policy that allows nothing yet.

    A folder that was a site's before keeps its policy, ledger and settings.

    Example: fedml site join fedml1.eyJ… --dir /var/lib/fedml
    """
    from fedml import durable
    from fedml import settings as files
    from fedml.cli.endpoint import ROOT
    from fedml.identity.certificates import Credentials
    from fedml.site.departure import come_back
    from fedml.site.policy import TEMPLATE
    from fedml.transport.rpc import join as enrol
    from fedml.transport.rpc import trusted_root

    async def go() -> Identity:
        identity = _broken_off(folder, token) or await enrol(token, folder / "identity", "site")
        durable.replace(folder / ROOT, await trusted_root(folder / "identity"))
        return identity

    name = asyncio.run(go()).name
    address = Credentials.load(folder / "identity").address
    files.write(_settled(folder, name, address, rest_port, grpc_port), folder / "site.toml")
    if not (folder / "policy.toml").exists():
        durable.replace(folder / "policy.toml", TEMPLATE.encode())
    come_back(folder)
    typer.echo(f"{name} has joined {address}; now say in {folder / 'policy.toml'} what it allows")


def _settled(
    folder: Path, name: str, address: str, rest_port: int | None, grpc_port: int | None
) -> Settings:
    """Return the settings of a site that joins; what is not said stays as it was."""
    from dataclasses import replace

    from fedml.site.settings import Settings, read_settings

    before = Settings(name, address)
    if (folder / "site.toml").exists():
        before = replace(read_settings(folder), name=name, coordinator=address)
    return replace(
        before,
        rest_port=before.rest_port if rest_port is None else rest_port,
        grpc_port=before.grpc_port if grpc_port is None else grpc_port,
    )


def _broken_off(folder: Path, token: str) -> Identity | None:
    """Return who we are by a join that spent its token and went no further; it can go on."""
    import time

    from fedml.identity.certificates import Credentials, identity_of
    from fedml.identity.enrolment import Token

    if (folder / "site.toml").exists() or not (folder / "identity" / "identity.json").exists():
        return None
    credentials = Credentials.load(folder / "identity")
    if credentials.ca.strip() != Token.parse(token).ca.strip():
        return None
    return identity_of(credentials.certificate, time.time())


@app.command()
def run(folder: Dir) -> None:
    """Run the site: obey the coordinator as far as the policy allows, serve what it released.

    SIGTERM lets it end the tasks under way, for at most 'drain' seconds; again, or Ctrl-C, ends
    it at once.

    Example: fedml site run /var/lib/fedml
    """
    from fedml.cli.endpoint import Site
    from fedml.cli.program import serve_forever

    serve_forever(Site(folder))


@app.command()
def leave(
    folder: Dir,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Leave the federation: the coordinator refuses this site's certificates from now on.

    Stop the daemon first. The folder stays, and with it the ledger of what your rows have spent.

    Example: fedml site leave /var/lib/fedml
    """
    from fedml import durable
    from fedml.site.settings import read_settings

    settings = read_settings(folder)
    question = f"{settings.name} leaves {settings.coordinator}, and needs a new token to come back"
    with durable.lock(folder, "fedml site leave"):
        if not yes and not typer.confirm(f"{question}. Leave?"):
            raise typer.Exit(1)
        asyncio.run(_depart(folder, settings))
    typer.echo(
        f"{settings.name} has left {settings.coordinator}. Keep {folder / 'ledger'}: it is what "
        "your rows have spent, wherever they train next"
    )


async def _depart(folder: Path, settings: Settings) -> None:
    import time

    from fedml.errors import Unreachable, Untrusted
    from fedml.identity.certificates import Credentials
    from fedml.site.departure import leave as go
    from fedml.transport.rpc import GrpcLink

    link = GrpcLink(Credentials.load(folder / "identity"))
    try:
        await go(folder, settings, link, time.time())
    except (Unreachable, Untrusted) as error:
        raise Unreachable(
            f"{error}. {folder} is marked and runs no more, but the coordinator does not know: "
            f"leave again once it answers, or have its operator run 'fedml coordinator revoke "
            f"{settings.name}'"
        ) from error
    finally:
        await link.close()


@app.command()
def allow(
    folder: Dir,
    dataset: Annotated[str, typer.Option(help="The name runs know the dataset by.")],
    recipe: Annotated[str, typer.Option(help="The recipe that may read it.")],
    train: Annotated[Path, typer.Option(help="File with the rows to train on.")],
    rows: Annotated[int, typer.Option(help="Your public statement of how many there are.")],
    epsilon: Annotated[
        float, typer.Option(help="Lifetime privacy budget of each row, or patient.")
    ] = 0.0,
    delta: Annotated[float, typer.Option(help="The delta of that budget.")] = 1e-5,
    privacy: Annotated[
        PrivacyMode | None,
        typer.Option(help="What runs must keep; patient with --patients, else record."),
    ] = None,
    site_epsilon: Annotated[
        float, typer.Option(help="Lifetime budget of the site as a whole, for site_… modes.")
    ] = 0.0,
    run_epsilon: Annotated[
        float | None, typer.Option(help="Of the budget, at most so much for one run.")
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="File with other rows, to score models on.")
    ] = None,
    patients: Annotated[
        int, typer.Option(help="Whose rows they are, publicly stated: the budget is a patient's.")
    ] = 0,
) -> None:
    """Add a dataset, and the installed recipe that may read it, to the site's policy.

    Example: fedml site allow ./bern --dataset breast_cancer --recipe breast_cancer \
    --train train.csv --held-out held.csv --rows 100 --epsilon 3
    """
    from fedml.learning.recipe import identify
    from fedml.site.policy import AllowedRecipe, Dataset, extend, read_policy

    path = folder / "policy.toml"
    own = read_policy(path).recipe_files
    mode = privacy or ("patient" if patients else "record")
    extend(
        path,
        recipe,
        AllowedRecipe(identify(recipe, own).digest),
        dataset,
        Dataset(
            train.resolve(),
            rows,
            (recipe,),
            held_out.resolve() if held_out else None,
            privacy=mode,
            epsilon=epsilon,
            delta=delta,
            patients=patients,
            site_epsilon=site_epsilon,
            run_epsilon=math.inf if run_epsilon is None else run_epsilon,
        ),
    )
    told = (
        "no budget" if mode == "none" else f"epsilon {epsilon or site_epsilon:g}, delta {delta:g}"
    )
    typer.echo(f"{path}: {recipe} may train on {dataset} in mode {mode}: {told}")


@app.command("allow-app")
def allow_app(
    folder: Dir,
    app_dir: Annotated[Path, typer.Argument(help="An app's folder, as 'flwr new' makes it.")],
    privacy: Annotated[
        str, typer.Option(help="'none', to say that you know: no budget bounds what it tells.")
    ],
    node_config: Annotated[
        str, typer.Option(help="What its ClientApp finds there: 'partition-id=0 key=\"text\"'.")
    ] = "",
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="A dataset of the policy, of privacy 'none', whose files it is told."),
    ] = None,
    seeded: Annotated[
        bool, typer.Option("--seeded", help="What it draws follows from the run's seed.")
    ] = False,
) -> None:
    """Let a Flower app run at this site: copy its code here, and allow it by its digest.

    Its ClientApp reads what the daemon's user may read, and tells what it likes: read it first.

    Example: fedml site allow-app ./bern my-app --privacy none \
    --node-config "partition-id=0 num-partitions=2"
    """
    from fedml import codebase, durable
    from fedml.cli.flower import known
    from fedml.errors import ConfigError
    from fedml.flower.app import settings_of
    from fedml.site.policy import AllowedApp, add_app, read_policy

    path, name = folder / "policy.toml", known(app_dir).name
    if privacy != "none":
        raise ConfigError(f"--privacy {privacy}: an app's answers have no other privacy than none")
    read_policy(path)
    durable.make_folder(folder / "apps")
    place, digest = codebase.keep(app_dir, folder / "apps", name)
    config = settings_of(node_config, "--node-config")
    app = AllowedApp(digest, place, "none", tuple(dataset or ()), config, seeded=seeded)
    add_app(path, name, app)
    typer.echo(f"{path}: app {name} {digest[:12]} may run here; from the daemon's next start on")


@app.command()
def check(folder: Dir) -> None:
    """Check settings, policy, data files and recipes, and say what the site would allow.

    Example: fedml site check /var/lib/fedml
    """
    from fedml.doctor.site import check_apps, check_files, check_recipes
    from fedml.site.policy import read_policy
    from fedml.site.settings import read_settings

    settings, policy = read_settings(folder), read_policy(folder / "policy.toml")
    findings = [*check_recipes(policy), *check_apps(policy), *check_files(policy)]
    problems = [finding for finding in findings if finding.state == "fail"]
    for problem in problems:
        text = f"problem: {problem.what}: {problem.found}; {problem.advice}"
        typer.secho(text, fg="red", err=True)
    if problems:
        raise typer.Exit(1)
    apps = f", {len(policy.apps)} apps" if policy.apps else ""
    counts = f"{len(policy.datasets)} datasets, {len(policy.recipes)} recipes{apps}"
    typer.echo(f"{settings.name}: {counts}")


@app.command()
def recipes(
    folder: Annotated[Path | None, typer.Argument(help="The site's folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the installed recipes with the digests that a policy names.

    Example: fedml site recipes
    """
    from fedml.cli.console import show
    from fedml.learning.recipe import installed
    from fedml.site.policy import read_policy

    own = read_policy(folder / "policy.toml").recipe_files if folder else {}
    show(
        installed(own),
        {"recipe": lambda r: r.name, "digest": lambda r: r.digest},
        as_json=as_json,
    )


@app.command()
def roster(
    folder: Dir,
    accept: Annotated[
        Path | None, typer.Option(help="File with the consortium's roster, to be accepted here.")
    ] = None,
) -> None:
    """Print this site's key for masked rounds, and the roster that was accepted; or accept one.

    A roster is a JSON object of sites and keys. Compare its digest with the other operators', by
    telephone: the coordinator has no say in it. The daemon reads it when it starts.

    Example: fedml site roster ./bern --accept roster.json
    """
    from fedml.errors import ConfigError
    from fedml.protocol.messages import SiteId
    from fedml.site import masks
    from fedml.site.settings import read_settings

    name = SiteId(read_settings(folder).name)
    if accept is not None:
        if not accept.is_file():
            raise ConfigError(f"--accept {accept}: no such file")
        masks.accept(folder, name, accept.read_bytes(), str(accept))
    key = masks.identity(folder).public_key().public_bytes_raw().hex()
    typer.echo(f'{{"{name}": "{key}"}}')
    if (found := masks.accepted(folder)) is not None:
        typer.echo(f"accepted here: roster {found.digest.hex()}")
        for member in found.members:
            typer.echo(f"  {member.site} {member.key.hex()}")


def serve_only(folder: Path, rest_port: int, grpc_port: int) -> None:
    """Serve a site's shelf without a coordinator or any training."""
    from fedml.serving.standalone import run as serve
    from fedml.telemetry import configure_logging

    configure_logging()
    serve(folder / "shelf", rest_port, grpc_port)
