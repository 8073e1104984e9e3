"""Help is there for every command, with an example, at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
import typer.main
from typer.testing import CliRunner

from fedml.cli.main import app

HEAVY = {
    "torch", "grpc", "mlflow", "hydra", "omegaconf", "numpy", "scipy", "rich", "typer.rich_utils",
    "cryptography", "structlog", "tuf", "onnxruntime", "opacus", "fastapi", "uvicorn", "psutil",
    "prometheus_client", "google.protobuf",
}  # fmt: skip


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, each in group.commands.items():
        if isinstance(each, click.Group):
            yield from commands(each, (*path, name))
        else:
            yield (*path, name)


ALL = list(commands(typer.main.get_command(app)))  # type: ignore[arg-type]


def test_the_list_of_commands_is_whole() -> None:
    assert {path[0] for path in ALL if path} == {
        "simulate", "demo", "predict", "serve", "doctor", "operator", "coordinator",
        "site", "run", "model", "privacy", "flower", "strategies",
    }  # fmt: skip
    assert ("coordinator", "run") in ALL


@pytest.mark.parametrize("path", [p for p in ALL if p != ("simulate",)], ids=" ".join)
def test_every_command_s_help_has_an_example(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [*path, "--help"])
    assert shown.exit_code == 0
    words = " ".join(shown.output.split())
    assert f"Example: fedml {' '.join(path)}".strip() in words
    assert "Usage: " in words
    assert "\\[" not in words


@pytest.mark.slow
def test_the_help_of_simulate_is_hydra_s_with_an_example() -> None:
    done = run("simulate", "--help")
    assert "Example: fedml simulate " in done.stdout
    assert "strategy: cyclic, ditto, fedadagrad" in done.stdout


@pytest.mark.parametrize("path", [(), ("coordinator",), ("site", "run"), ("run", "submit")])
def test_help_loads_nothing_that_takes_time(path: tuple[str, ...]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = {['fedml', *path, '--help']!r}\n"
        "from fedml.cli.main import main\n"
        "try:\n    main()\n"
        "except SystemExit as leave:\n    assert not leave.code\n"
        f"print(sorted({HEAVY!r} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_version_is_told() -> None:
    assert run("--version").stdout.strip().count(".") >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rum",), "No such command 'rum'."),
        (("model", "release", "m", "one"), "'one' is not a valid int"),
        (("site", "run"), "Missing argument 'FOLDER'."),
        (("coordinator", "invite", "bern", "--hour", "1"), "No such option"),
    ],
)
def test_wrong_usage_is_status_two_and_no_traceback(
    arguments: tuple[str, ...], message: str
) -> None:
    done = run(*arguments, status=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def run(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "fedml", *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done.stderr
    return done
