"""`fedml operator`: become one with a token, and get a fresh certificate in time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from fedml.cli.profile import ProfileOption, home

if TYPE_CHECKING:
    from fedml.identity.certificates import Identity

app = typer.Typer(
    help="Become an operator or a viewer; renew.\n\nExample: fedml operator join TOKEN",
    no_args_is_help=True,
)


@app.command()
def join(
    token: Annotated[
        str, typer.Argument(help="What 'fedml coordinator invite --role operator' printed.")
    ],
    profile: ProfileOption = None,
) -> None:
    """Make a key, have it certified with a token, and keep both as your profile.

    Example: fedml operator join fedml1.eyJ… --profile ./eve
    """
    from fedml.errors import ConfigError
    from fedml.transport.rpc import join as enrol

    folder = profile or home()
    if (folder / "identity.json").exists():
        raise ConfigError(f"{folder} is a profile already; name another with --profile")
    typer.echo(f"{asyncio.run(enrol(token, folder))}: profile in {folder}")


@app.command()
def renew(profile: ProfileOption = None) -> None:
    """Get a fresh certificate for 30 days; the one you have must still be good.

    Example: fedml operator renew --profile ./eve
    """
    from fedml.cli.console import when
    from fedml.identity.certificates import Credentials
    from fedml.transport.rpc import GrpcLink
    from fedml.transport.rpc import renew as again

    folder = profile or home()

    async def go() -> Identity:
        link = GrpcLink(Credentials.load(folder))
        try:
            return await again(link, folder)
        finally:
            await link.close()

    identity = asyncio.run(go())
    typer.echo(f"{identity}: good until {when(identity.expires)} UTC")
