"""How the command line speaks: one line for an error, tables for people, JSON for scripts."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import NoReturn, TypeVar

import click
import typer

from fedml.errors import ConfigError, FedmlError

T = TypeVar("T")
_WIDE = 10_000  # columns for a pipe, so that no id is cut
_FAR = 10 * 365.25 * 86_400.0  # seconds
_INTERRUPTED, _TERMINATED = 130, 143  # what a shell reports for Ctrl-C and SIGTERM


def guarded(command: Callable[[], object]) -> None:
    """Run the outermost call of a command line: an error becomes one line and a status.

    Ours exit 1, wrong usage 2, Ctrl-C 130, SIGTERM 143. `command` returns an exit status or None.
    """
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: _leave(told, number))
    try:
        status = command()
    except FedmlError as error:
        fail(str(error))
    except BrokenPipeError:  # `fedml ... | head`
        sys.stderr.close()
        raise SystemExit(1) from None
    except OSError as error:  # a disk that is full, a folder that may not be read
        fail(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fedml":
            raise  # a bug of ours, not a missing extra
        fail(
            f"{error.name} is not installed, and this command needs it; a site: pip install "
            "'fedml-consortium[site]', a coordinator: [coordinator], simulation and demo: [sim]"
        )
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, click.Abort):
        typer.secho("stopped", fg="yellow", err=True)
        raise SystemExit(_TERMINATED if told else _INTERRUPTED) from None
    else:
        status = status if isinstance(status, int) else 0  # click makes 130 of Ctrl-C itself
        raise SystemExit(_TERMINATED if told else status)


def _leave(told: list[int], number: int) -> None:
    """Note a signal, and leave by the way of Ctrl-C: what was started is stopped."""
    told.append(number)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)  # which an event loop takes calmly


def fail(message: str) -> NoReturn:
    """Print one line on standard error and exit with status 1."""
    typer.secho(f"error: {message}", fg="red", err=True)
    raise SystemExit(1)


def show(
    items: Sequence[T],
    columns: Mapping[str, Callable[[T], object]],
    *,
    as_json: bool,
    empty: str = "nothing yet",
) -> None:
    """Print dataclasses as a table, or as one JSON object a line."""
    if as_json:
        for item in items:
            emit(item)
        return
    if not items:
        typer.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in columns:
        table.add_column(title, overflow="fold")
    for item in items:
        table.add_row(*(str(read(item)) for read in columns.values()))
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)


def emit(value: object) -> None:
    """Print one JSON object on a line."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    typer.echo(json.dumps(plain, sort_keys=True))


@contextmanager
def progress(text: str, *, lines: bool = True) -> Iterator[Callable[[str], None]]:
    """Show a spinner while something takes more than a moment; the caller may change its text.

    On anything but a terminal it prints each new text as a line, if `lines`.
    """
    if not sys.stderr.isatty():

        def say(new: str) -> None:
            if lines:
                typer.echo(new, err=True)

        say(text)
        yield say
        return
    from rich.console import Console

    with Console(stderr=True).status(text) as status:
        yield lambda new: status.update(new)


def when(seconds: float) -> str:
    """Return a time since the epoch as people write it, in UTC; "never" for 0."""
    from datetime import UTC, datetime

    return (
        datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S") if seconds else "never"
    )


def moment(text: str, now: float) -> float:
    """Return the seconds since the epoch of an ISO 8601 time to come, ours or with an offset.

    Raises `ConfigError` if it is none, has passed, or lies so far ahead that it is a slip.
    """
    from datetime import datetime

    try:
        seconds = datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(
            f"--at {text!r}: write a time as 2030-01-31T20:00, or with an offset as "
            "2030-01-31T20:00+01:00"
        ) from error
    if seconds < now:
        raise ConfigError(f"--at {text!r} has passed, it is {when(now)} UTC; leave it out for now")
    if seconds > now + _FAR:
        raise ConfigError(f"--at {text!r} is more than ten years ahead; is the year right?")
    return seconds


def scores(values: Iterable[tuple[str, float]]) -> str:
    """Return scores in a line, `accuracy .953`."""
    return "  ".join(f"{name} {value:.3f}" for name, value in sorted(values))
