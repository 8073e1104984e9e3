"""What `fedml doctor` prints: a line a finding, what to do at its end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import typer

from fedml.cli.console import emit
from fedml.doctor.examine import examine

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
_WIDTH = 14  # of what was looked at


def report(folder: Path, *, as_json: bool) -> None:
    """Print what is to be said of `folder`; exits with status 1 if anything fails."""
    findings = asyncio.run(examine(folder))
    for finding in findings:
        if as_json:
            emit(finding)
            continue
        state = typer.style(f"{finding.state:4}", fg=_COLOURS[finding.state])
        advice = f" -> {finding.advice}" if finding.advice else ""
        typer.echo(f"{state}  {finding.what:{_WIDTH}}  {finding.found}{advice}")
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)
