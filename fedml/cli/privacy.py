"""`fedml privacy`: what privacy costs, and whether it holds."""

from __future__ import annotations

import typer

from fedml.cli.audit import audit

app = typer.Typer(
    help="Look into what privacy costs, and whether it holds.\n\n"
    "Example: fedml privacy audit --epsilon 3",
    no_args_is_help=True,
)
app.command()(audit)
