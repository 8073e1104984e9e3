"""The house rules are enforced: each planted violation breaks `make check`."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the package and its settings, to plant violations in."""
    house = tmp_path / "house"
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(ROOT / "fedml", house / "fedml", ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", house)
    return house


def verdict(house: Path, *command: str) -> tuple[int, str]:
    program = str(BIN / command[0])
    done = subprocess.run(
        [program, *command[1:]],
        cwd=house,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(house), "PATH": "/usr/bin:/bin"},
    )
    return done.returncode, done.stdout + done.stderr


def plant(house: Path, file: str, text: str) -> None:
    path = house / "fedml" / file
    path.write_text(path.read_text() + text)


def test_the_house_as_it_stands_is_in_order(copy: Path) -> None:
    assert verdict(copy, "lint-imports", "--no-cache")[0] == 0
    assert verdict(copy, "ruff", "check", "--no-cache", "fedml")[0] == 0


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("strategies/base.py", "import fedml.coordinator.desk", "imports only go down"),
        ("site/gate.py", "import fedml.coordinator.desk", "imports only go down"),
        ("rounds/round.py", "import grpc", "the pure floors do no network"),
        ("privacy/accounting.py", "import asyncio", "the pure floors do no network"),
        ("coordinator/host.py", "import hydra", "hydra stays on the roof"),
        ("site/daemon.py", "import torch", "never load torch"),
        ("serving/engine.py", "import fedml.params", "never load torch"),
    ],
)
def test_a_planted_import_breaks_the_floors(
    copy: Path, file: str, line: str, contract: str
) -> None:
    plant(copy, file, f"\n{line}  # noqa: E402, F401\n")
    status, output = verdict(copy, "lint-imports", "--no-cache")
    assert status != 0
    assert any(contract in row and "BROKEN" in row for row in output.splitlines()), output


def test_a_package_that_no_floor_knows_breaks_the_floors(copy: Path) -> None:
    (copy / "fedml" / "utils").mkdir()
    (copy / "fedml" / "utils" / "__init__.py").write_text('"""Homeless functions."""\n')
    status, output = verdict(copy, "lint-imports", "--no-cache")
    assert status != 0
    assert "utils" in output


def test_an_undocumented_public_function_breaks_the_style(copy: Path) -> None:
    plant(copy, "params.py", "\n\ndef mystery(x: int) -> int:\n    return x\n")
    status, output = verdict(copy, "ruff", "check", "--no-cache", "fedml")
    assert status != 0
    assert "D103" in output


def test_a_swallowed_exception_breaks_the_style(copy: Path) -> None:
    plant(copy, "params.py", "\n\ntry:\n    import this\nexcept Exception:\n    this = None\n")
    status, output = verdict(copy, "ruff", "check", "--no-cache", "fedml")
    assert status != 0
    assert "BLE001" in output


def test_another_package_named_fedml_is_refused_at_import(tmp_path: Path) -> None:
    info = tmp_path / "fedml-0.9.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fedml\nVersion: 0.9.6\n")
    done = subprocess.run(
        [sys.executable, "-c", "import fedml"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
    )
    assert done.returncode != 0
    assert "pip uninstall fedml" in done.stderr
