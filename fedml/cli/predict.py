"""`fedml predict`: rows of a CSV file in, a model's answers out."""

from __future__ import annotations

import csv
from pathlib import Path

import typer

from fedml.cli.console import emit
from fedml.errors import ConfigError
from fedml.serving.client import predict


def ask(rows: Path, model: str, url: str, *, as_json: bool) -> None:
    """Print the model's outputs for each row; for several numbers also which is the largest."""
    answers = predict(url, model, read_rows(rows))
    for number in range(len(next(iter(answers.values()), []))):
        record = {name: values[number] for name, values in answers.items()}
        if as_json:
            emit({"row": number, **record})
        else:
            parts = (f"{name} {_text(value)}" for name, value in record.items())
            typer.echo(f"row {number}: " + "  ".join(parts))


def read_rows(path: Path) -> list[list[float]]:
    """Return a CSV file's numbers; a first line that is no numbers is taken for a header.

    Raises `ConfigError` naming the line that does not read.
    """
    try:
        with path.open(newline="") as file:
            lines = [line for line in csv.reader(file) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: {error}; give a CSV file of numbers") from error
    table = []
    for number, line in enumerate(lines, 1):
        try:
            table.append([float(cell) for cell in line])
        except ValueError as error:
            if number > 1:
                raise ConfigError(f"{path}, line {number}: {str(error)[:80]}") from error
    if not table:
        raise ConfigError(f"{path}: no rows of numbers")
    if len({len(row) for row in table}) > 1:
        raise ConfigError(f"{path}: rows of different lengths; each needs the same columns")
    return table


def _text(value: object) -> str:
    if not isinstance(value, list):
        return f"{value}"
    largest = max(range(len(value)), key=lambda place: value[place])
    numbers = ", ".join(f"{number:.4g}" for number in value)
    return f"[{numbers}], largest is number {largest}"
