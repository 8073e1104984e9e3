"""Data files of the experiments: from a folder of yours, else downloaded once; always checked.

A file is looked for below the folder that `FEDML_DATA` names, then below the cache
(`$XDG_CACHE_HOME/fedml`, else `~/.cache/fedml`), and is downloaded into the cache if it is in
neither. Nothing is read before its SHA-256 is right.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from fedml import durable
from fedml.errors import ConfigError

_PATIENCE = 60.0  # seconds without a byte
_MOST = 64 * 2**20  # bytes of a file


@dataclass(frozen=True)
class Source:
    """A file: its place below a data folder, its official address, its contents' SHA-256.

    Several digests where copies in circulation differ, say by a header line. A `.gz` file is
    known by what is packed in it, for packers differ.
    """

    place: str
    url: str
    digests: tuple[str, ...]


def find(source: Source) -> Path:
    """Return where the file is on this machine, after fetching it if need be.

    Raises `ConfigError` in one line if it cannot be had, or is another file than it should be.
    """
    given = os.environ.get("FEDML_DATA")
    folders = [*([Path(given)] if given else []), _cache()]
    for folder in folders:
        path = folder / source.place
        if path.is_file():
            _check(source, str(path), _read(path), "replace it, or unset FEDML_DATA")
            return path
    path = folders[-1] / source.place
    looked = f"{source.place} is not in " + " nor in ".join(map(str, folders))
    data = _download(source, looked)
    _check(source, source.url, data, f"fetch the right file by hand to {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.replace(path, data)
    return path


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "fedml"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; make it readable") from error


def _download(source: Source, looked: str) -> bytes:
    try:
        with urllib.request.urlopen(source.url, timeout=_PATIENCE) as answer:
            data: bytes = answer.read(_MOST)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise ConfigError(
            f"{looked}, and {source.url} cannot be fetched ({why}); "
            "set FEDML_DATA to a folder that has it"
        ) from error
    return data


def _check(source: Source, where: str, data: bytes, way_out: str) -> None:
    try:
        content = gzip.decompress(data) if source.place.endswith(".gz") else data
    except (OSError, EOFError) as error:
        raise ConfigError(f"{where} is no gzip file ({error}); {way_out}") from error
    found = hashlib.sha256(content).hexdigest()
    if found not in source.digests:
        wanted = " or ".join(digest[:12] for digest in source.digests)
        raise ConfigError(f"{where}: SHA-256 is {found[:12]}, not {wanted}; {way_out}")
