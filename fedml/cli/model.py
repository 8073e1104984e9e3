"""`fedml model`: versions, their lineage, and which one the sites serve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fedml.cli.profile import JsonOption, ProfileOption, call

if TYPE_CHECKING:
    from fedml.protocol.operations import ModelVersion
    from fedml.transport.link import Operations

app = typer.Typer(
    help="See model versions, release them, roll back.\n\n"
    "Example: fedml model release breast_cancer 1",
    no_args_is_help=True,
)
Name = Annotated[str, typer.Argument(help="The model's name.")]
Version = Annotated[int, typer.Argument(help="The version's number.")]


@app.command("list")
def list_(profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """List all versions of all models.

    Example: fedml model list
    """
    from fedml.cli.console import scores, show, when

    async def go(coordinator: Operations) -> Sequence[ModelVersion]:
        return await coordinator.list_models()

    show(
        call(profile, go),
        {
            "model": lambda m: m.model,
            "version": lambda m: m.version,
            "state": lambda m: m.state,
            "run": lambda m: m.run,
            "scores": lambda m: scores(m.scores.items()),
            "epsilon": lambda m: f"{max(m.epsilon.values(), default=0):.2f}",
            "created": lambda m: when(m.created),
            "digest": lambda m: m.digest[:12],
        },
        as_json=as_json,
    )


@app.command()
def show(
    name: Name, version: Version, profile: ProfileOption = None, as_json: JsonOption = False
) -> None:
    """Show a version with its privacy card and its whole lineage.

    Example: fedml model show breast_cancer 1
    """
    from fedml.cli.card import card_of
    from fedml.cli.console import emit

    async def go(coordinator: Operations) -> tuple[ModelVersion, str]:
        found = await coordinator.show_model(name, version)
        return found, "" if as_json else await card_of(coordinator, found)

    found, card = call(profile, go)
    if as_json:
        emit(found)
    else:
        typer.echo(f"{found.model}/{found.version}  {found.state}  release {found.digest}")
        typer.echo(card)
        typer.echo(json.dumps(json.loads(found.manifest), indent=2, sort_keys=True))


@app.command()
def release(
    name: Name, version: Version, profile: ProfileOption = None, as_json: JsonOption = False
) -> None:
    """Sign a version and send it to the sites; each verifies it before it serves it.

    Example: fedml model release breast_cancer 1
    """

    async def go(coordinator: Operations) -> ModelVersion:
        return await coordinator.release(name, version)

    _say(call(profile, go), as_json)


@app.command()
def rollback(name: Name, profile: ProfileOption = None, as_json: JsonOption = False) -> None:
    """Make the sites serve the version that was live before.

    Example: fedml model rollback breast_cancer
    """

    async def go(coordinator: Operations) -> ModelVersion:
        return await coordinator.rollback(name)

    _say(call(profile, go), as_json)


def _say(found: ModelVersion, as_json: bool) -> None:
    from fedml.cli.console import emit

    if as_json:
        emit(found)
    else:
        typer.echo(f"{found.model}/{found.version} is live: release {found.digest}")
