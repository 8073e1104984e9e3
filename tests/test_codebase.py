"""A folder of code is what its digest says, and a copy holds nothing else."""

from pathlib import Path

import pytest

from fedml.codebase import digest, keep
from fedml.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "app"
    for name in ("app.py", "sub/task.py", "pyproject.toml", "rows.csv", ".git/hook.py"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
    return place


def test_a_copy_has_the_code_and_the_digest_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    place, found = keep(folder, tmp_path / "kept", "ward")
    assert place == tmp_path / "kept" / f"ward-{found[:12]}"
    assert found == digest(folder) == digest(place)
    files = {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()}
    assert files == {"app.py", "sub/task.py", "pyproject.toml"}
    assert keep(folder, tmp_path / "kept", "ward") == (place, found)  # again is once


@pytest.mark.parametrize("change", ["edit", "move", "add", "remove"])
def test_every_change_of_code_shows_in_the_digest(folder: Path, change: str) -> None:
    before = digest(folder)
    match change:
        case "edit":
            (folder / "sub/task.py").write_text("other")
        case "move":
            (folder / "sub/task.py").rename(folder / "sub/tusk.py")
        case "add":
            (folder / "more.py").touch()
        case _:
            (folder / "app.py").unlink()
    assert digest(folder) != before


def test_what_is_no_code_does_not_show(folder: Path) -> None:
    before = digest(folder)
    (folder / "final_model.pt").write_bytes(b"weights")
    (folder / ".cache").mkdir()
    (folder / ".cache/task.py").touch()
    assert digest(folder) == before


def test_a_folder_without_code_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty has no code in it"):
        digest(tmp_path / "empty")
    with pytest.raises(ConfigError, match="No such file"):
        digest(tmp_path / "nowhere")
