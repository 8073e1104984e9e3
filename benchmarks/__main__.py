"""The one door: `python -m benchmarks [NAME ...] [--json] [--quick] [--list]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from benchmarks.catalogue import Benchmark, Reading, Skipped, select
from fedml.errors import ConfigError, FedmlError

_WRONG_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for and print it; return the exit status."""
    asked = _parse(arguments)
    try:
        chosen = select(asked.names)
    except ConfigError as error:
        return _complain(error, _WRONG_USAGE)
    if asked.list:
        print("\n".join(each.name for each in chosen))
        return 0
    readings = []
    for each in chosen:
        _say(f"{each.name} ...")
        try:
            reading = each.measure(asked.quick, _say)
        except Skipped as error:
            _say(f"  skipped: {error}")
            continue
        except FedmlError as error:
            return _complain(error, 1)
        readings.append((each, reading))
        if asked.json:
            print(_line(each, reading), flush=True)
    if not asked.json:
        _show(readings)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Measure fedml beside the physical limit of the same work.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="a name or its start; none: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--quick", action="store_true", help="short runs: rough figures")
    parser.add_argument("--list", action="store_true", help="only list the names")
    return parser.parse_args(arguments)


def _line(each: Benchmark, reading: Reading) -> str:
    record = {
        "name": each.name,
        "value": reading.value,
        "unit": each.unit,
        "limit": reading.limit,
        "ratio": reading.ratio,
        "extra": dict(reading.extra),
    }
    return json.dumps(record)


def _show(readings: Sequence[tuple[Benchmark, Reading]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("benchmark")
    for title in ("value", "limit", "ratio"):
        table.add_column(title, justify="right")
    for each, reading in readings:
        value, limit = (f"{number:.4g} {each.unit}" for number in (reading.value, reading.limit))
        table.add_row(each.name, value, limit, f"{reading.ratio:.2f}")
    console = Console()
    console.print(table)
    for each, reading in readings:
        if reading.extra:
            figures = (f"{name} {figure:.4g}" for name, figure in reading.extra.items())
            console.print(f"{each.name}: {', '.join(figures)}", highlight=False)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _complain(error: FedmlError, status: int) -> int:
    _say(f"error: {error}")
    return status


if __name__ == "__main__":
    sys.exit(main())
