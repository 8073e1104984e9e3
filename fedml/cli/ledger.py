"""`fedml privacy ledger`: what a site's rows have spent, and whether its ledgers are whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fedml.cli.profile import JsonOption

if TYPE_CHECKING:
    from fedml.privacy.statement import Statement
    from fedml.site.door import Book

app = typer.Typer(
    help="Read a site's ledgers; the daemon may be running.\n\n"
    "Example: fedml privacy ledger show /var/lib/fedml",
    no_args_is_help=True,
)
Dir = Annotated[Path, typer.Argument(help="The site's folder.")]


@app.command()
def show(folder: Dir, as_json: JsonOption = False) -> None:
    """Show what each dataset has spent of its lifetime budget, and in which runs.

    Example: fedml privacy ledger show /var/lib/fedml
    """
    from fedml.cli.console import emit

    for book in _books(folder):
        found = _statement(book)
        if as_json:
            emit(found)
            continue
        typer.echo(
            f"{found.dataset}: epsilon {found.spent:.3f} of {found.limit:g} spent at delta "
            f"{found.delta:g}, {found.adjacency} {found.unit}; {found.charged} charged, "
            f"{found.reserved} reserved"
        )
        for run, spent in found.runs.items():
            typer.echo(f"  run {run}: {spent:.3f}")


@app.command()
def verify(folder: Dir) -> None:
    """Walk each ledger's chain of records, and look for answers that no charge covers.

    One line for what is wrong, and status 1.

    Example: fedml privacy ledger verify /var/lib/fedml
    """
    from fedml.site.door import unpaid

    for book in _books(folder):
        found = _statement(book)
        if problem := unpaid(folder, book):
            from fedml.errors import Corrupt

            raise Corrupt(problem)
        tasks = found.charged + found.reserved
        typer.echo(f"{found.dataset}, by {found.unit}: whole, {tasks} tasks that count")


@app.command()
def export(
    folder: Dir,
    as_: Annotated[Literal["json", "csv"], typer.Option("--as", help="Of what form.")] = "json",
) -> None:
    """Print every task of every ledger: one JSON object a line, or CSV with a header.

    Example: fedml privacy ledger export /var/lib/fedml --as csv > ledger.csv
    """
    import csv
    import sys

    from fedml.cli.console import emit
    from fedml.privacy import chain
    from fedml.privacy.statement import rows

    lines = [
        row
        for book in _books(folder)
        if book.path.exists()
        for row in rows(book.name, book.unit, chain.read(book.path))
    ]
    if as_ == "json":
        for line in lines:
            emit(dict(line))
        return
    names = list(dict.fromkeys(name for line in lines for name in line))
    table = csv.DictWriter(sys.stdout, names, lineterminator="\n")
    table.writeheader()
    table.writerows(lines)


def _books(folder: Path) -> Iterator[Book]:
    from fedml.site.door import books
    from fedml.site.policy import read_policy

    yield from books(folder, read_policy(folder / "policy.toml"))


def _statement(book: Book) -> Statement:
    from fedml.privacy.statement import state

    return state(book.path, book.name, book.unit, book.limits)
