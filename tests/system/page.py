"""A page of the documentation as the commands it shows."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import typer.main

ROOT = Path(__file__).parents[2]
_ELSEWHERE = ("sudo ", "docker ")  # root's, systemd's and Docker's


def commands(page: str) -> list[str]:
    """Return the commands of a page's boxes in order, a continued line as one."""
    boxes = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)
    lines = "".join(boxes).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def play(script: str, folder: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a shell script in `folder` as a user would, who has `fedml` and nothing of ours."""
    programs, bash = folder / "bin", shutil.which("bash")
    programs.mkdir()
    for name, words in (("fedml", " -m fedml"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{words} "$@"\n')
        (programs / name).chmod(0o755)
    (folder / "script").write_text(script)
    assert bash is not None
    return subprocess.run(
        [bash, "-c", "set -eu; trap 'jobs -p | xargs -r kill' EXIT; . ./script"],
        cwd=folder,
        env={"PATH": f"{programs}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def is_elsewhere(command: str) -> bool:
    """True for what needs root, systemd or Docker."""
    return command.startswith(_ELSEWHERE)


def check_fedml(words: list[str]) -> None:
    """Raise `click.UsageError` unless these are the arguments of a `fedml` command."""
    from fedml.cli.main import app

    command: click.Command = typer.main.get_command(app)
    path, rest = ["fedml"], list(words)
    while isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest[0])
        if found is None:
            raise click.UsageError(f"fedml has no command {rest[0]!r}")
        command, path, rest = found, [*path, rest[0]], rest[1:]
    command.make_context(" ".join(path), rest)


def words(command: str) -> list[str]:
    """Return a command's words as a shell splits them, without its comment."""
    return shlex.split(command, comments=True)
