"""`fedml privacy`: what privacy costs, what was spent, and whether it holds."""

from __future__ import annotations

import typer

from fedml.cli import ledger
from fedml.cli.audit import audit
from fedml.cli.card import card
from fedml.cli.forecast import plan

app = typer.Typer(
    help="Look into what privacy costs, and whether it holds.\n\n"
    "Example: fedml privacy plan --rows 500 --epsilon 3 --rounds 20 --steps 10 --batch 50",
    no_args_is_help=True,
)
app.command()(plan)
app.command()(audit)
app.command()(card)
app.add_typer(ledger.app, name="ledger")
