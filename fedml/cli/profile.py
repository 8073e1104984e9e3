"""Who an operator is: a folder with a certificate and the coordinator's address."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from fedml.errors import ConfigError

if TYPE_CHECKING:
    from fedml.identity.certificates import Credentials
    from fedml.transport.link import Operations

T = TypeVar("T")
_PATIENCE = 15.0  # seconds for a coordinator to answer, one that has just been started too
ProfileOption = Annotated[
    Path | None,
    typer.Option(
        envvar="FEDML_PROFILE",
        help="Folder with your operator credentials; default ~/.config/fedml.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON, for scripts.")]


def home() -> Path:
    """Return the profile folder used when none is named."""
    return Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser() / "fedml"


def load(profile: Path | None) -> Credentials:
    """Return the credentials of a profile; raises `ConfigError` if there is none."""
    from fedml.identity.certificates import Credentials

    folder = profile or home()
    if not (folder / "identity.json").exists():
        raise ConfigError(
            f"{folder} holds no operator credentials; name them with --profile or FEDML_PROFILE "
            "(a coordinator's own are in its folder, under operator/)"
        )
    return Credentials.load(folder)


def call(profile: Path | None, work: Callable[[Operations], Awaitable[T]]) -> T:
    """Do `work` with a connection as this profile; raises `ConfigError` if there is no profile."""
    from fedml.transport.rpc import OperationsClient

    credentials = load(profile)

    async def go() -> T:
        client = OperationsClient(credentials)
        try:
            await client.reach(_PATIENCE)
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(go())
