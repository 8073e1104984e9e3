"""`fedml privacy card`: what privacy a version has, in one paragraph."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from fedml.cli.profile import JsonOption, ProfileOption, call

if TYPE_CHECKING:
    from fedml.protocol.operations import ModelVersion
    from fedml.transport.link import Operations


def card(
    name: Annotated[str, typer.Argument(help="The model's name.")],
    version: Annotated[int, typer.Argument(help="The version's number.")],
    profile: ProfileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a version protects, against whom, at which epsilon, and what it does not.

    The same text lies in the version's bundle, as privacy.txt.

    Example: fedml privacy card breast_cancer 1
    """
    from fedml.cli.console import emit

    async def go(coordinator: Operations) -> str:
        return await card_of(coordinator, await coordinator.show_model(name, version))

    text = call(profile, go)
    if as_json:
        emit({"model": name, "version": version, "card": text})
    else:
        typer.echo(text, nl=False)


async def card_of(coordinator: Operations, found: ModelVersion) -> str:
    """Return a version's card, made of its lineage and of its run's plan."""
    from fedml.protocol.messages import Privacy
    from fedml.records import from_record
    from fedml.releases.card import card as write

    detail = await coordinator.show_run(found.run)
    privacy = from_record(Privacy, json.loads(detail.plan)["privacy"], "privacy")
    rounds = json.loads(found.manifest)["lineage"]["rounds"]
    return write(f"{found.model}/{found.version}", privacy, rounds, found.epsilon)
