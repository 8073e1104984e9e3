"""A folder of somebody's code and settings: told apart by a digest, copied with nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from blake3 import blake3

from fedml import durable
from fedml.errors import ConfigError

_FILES = (".py", ".toml")  # what code is made of; a run may leave others beside them
_SHORT = 12  # characters of a digest in a folder's name


def digest(folder: Path) -> str:
    """Return a digest of the folder's code and settings; raises `ConfigError` if it has none."""
    total, empty = blake3(), True
    for path in sorted(_files(folder)):
        data, empty = path.read_bytes(), False
        total.update(f"{path.relative_to(folder)} {len(data)}\n".encode())
        total.update(data)
    if empty:
        raise ConfigError(f"{folder} has no code in it")
    return total.hexdigest()


def keep(folder: Path, under: Path, name: str) -> tuple[Path, str]:
    """Copy the folder's code to a folder of its own in `under`; return that, and the digest.

    One that is there already is not touched, whatever became of it: its digest tells.
    """
    source, found = folder.resolve(), digest(folder.resolve())
    kept = place(under, name, found)
    if not kept.exists():
        draft = under / f".{kept.name}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        for path in _files(source):
            copy = draft / path.relative_to(source)
            durable.make_folder(copy.parent)
            durable.replace(copy, path.read_bytes())
        draft.rename(kept)
        durable.sync_folder(under)
    return kept, found


def place(under: Path, name: str, digest: str) -> Path:
    """Return where `keep` puts the code of a digest."""
    return under / f"{name}-{digest[:_SHORT]}"


def _files(folder: Path) -> Iterator[Path]:
    try:
        found = list(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; name the folder of an app") from error
    for path in found:
        aside = path.name.startswith((".", "__pycache__")) or (path / "pyvenv.cfg").exists()
        if aside or (path.is_dir() and path.is_symlink()):
            continue
        if path.is_dir():
            yield from _files(path)
        elif path.suffix in _FILES:
            yield path
