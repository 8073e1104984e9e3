"""The doctor looks at the machine: disk, open files, ports, and what is installed."""

from __future__ import annotations

import errno
import os
import platform
import re
import resource
import shutil
import socket
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from fedml import durable
from fedml.doctor.finding import Finding, size
from fedml.errors import ConfigError

PACKAGE = "fedml-consortium"
_LEAST, _SPARE = 64 * 2**20, 2**30  # bytes
_FEW_NODES = 1000
_TOLD = ("torch", "onnxruntime", "mlflow", "grpcio")  # whose versions are told in any case


def disk(folder: Path, need: float) -> Finding:
    """Look at the room in `folder`; `need` is the bytes that the largest round here takes."""
    usage, nodes = shutil.disk_usage(folder), os.statvfs(folder)
    if nodes.f_files and nodes.f_favail < _FEW_NODES:
        found = f"{nodes.f_favail} more files can be made"
        return Finding("fail", "disk", found, "delete files, or make the file system larger")
    return judge_room(usage.free, usage.total, need)


def judge_room(free: float, total: float, need: float) -> Finding:
    """Return whether so many free bytes are enough for rounds of `need` bytes."""
    least = max(need, _LEAST)
    found = f"{size(free)} free of {size(total)}; a round here takes {size(need)}"
    if free < least:
        return Finding("fail", "disk", found, "free space, or work will wait for it")
    if free < 2 * least + _SPARE:
        return Finding("warn", "disk", found, "free some space soon")
    return Finding("ok", "disk", found)


def holder(folder: Path, start: str) -> Finding:
    """Look at who has the folder; `start` says how its program is started."""
    name = durable.holder(folder)
    if name:
        return Finding("ok", "program", f"{name} is running")
    return Finding("warn", "program", "is not running", start)


def files(least: int, who: str) -> Finding:
    """Look at how many open files the program `who` may have, or we if it is not running."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    whose = "in this shell"
    if found := re.search(r"process (\d+)", who):
        try:
            limits = Path("/proc", found[1], "limits").read_text()
            row = next(line for line in limits.splitlines() if line.startswith("Max open files"))
            hard = int(row.split()[4].replace("unlimited", "-1"))
            whose = f"in process {found[1]}"
        except (OSError, StopIteration, ValueError):  # another user's, or in another container
            pass
    if hard == resource.RLIM_INFINITY or hard >= least:
        return Finding("ok", "files", f"{'any number' if hard < 0 else hard} may be open {whose}")
    advice = f"raise it to {least}: LimitNOFILE= of the unit, or ulimit -Hn"
    return Finding("warn", "files", f"only {hard} may be open {whose}", advice)


def port(name: str, host: str, number: int, who: str) -> Finding:
    """Look at a port of ours: open if its program `who` is running, free if it is not."""
    what = f"port {number}"
    if number == 0:
        return Finding("ok", "port", f"{name}: takes a free one at each start")
    if who:
        if _listens(host, number):
            return Finding("ok", what, f"{name}: open")
        advice = "if it has not just been started, read its log"
        return Finding("fail", what, f"{name}: nothing listens on {host}", advice)
    try:
        _bind(host, number)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            advice = f"stop what has it (ss -tlnp sport = :{number}), or set another"
            return Finding("fail", what, f"{name}: another program has it", advice)
        found = f"{name}: cannot listen on {host}: {error.strerror}"
        return Finding("fail", what, found, "set an address of this machine and a port above 1023")
    return Finding("ok", what, f"{name}: free")


def _listens(host: str, number: int) -> bool:
    here = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}.get(host, host)
    try:
        socket.create_connection((here.strip("[]"), number), 3.0).close()
    except OSError:
        return False
    return True


def _bind(host: str, number: int) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host.strip("[]"), number, type=socket.SOCK_STREAM
    )[0]
    with socket.socket(family, kind, protocol) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        trial.bind(address)


def packages(extra: str) -> Finding:
    """Look at whether what `extra` needs is installed, in versions that fit."""
    try:
        wanted = list(_wanted(extra))
    except metadata.PackageNotFoundError:
        advice = f"install it: pip install '{PACKAGE}[{extra}]'"
        return Finding("warn", "packages", "fedml runs from its source: no list of needs", advice)
    install = f"pip install --constraint requirements.lock '{PACKAGE}[{extra}]'"
    if bad := [text for need in wanted if (text := _misfit(need))]:
        return Finding("fail", "packages", ", ".join(bad), install)
    if misfit := [text for need in _wanted("flower") if _has(need) and (text := _misfit(need))]:
        return Finding("warn", "packages", ", ".join(misfit), f"pip install '{PACKAGE}[flower]'")
    told = [f"{need.name} {metadata.version(need.name)}" for need in wanted if need.name in _TOLD]
    return Finding("ok", "packages", ", ".join([f"Python {platform.python_version()}", *told]))


def _wanted(extra: str) -> Iterator[Requirement]:
    """Yield what must be installed for `extra`, Python among it."""
    for text in metadata.requires(PACKAGE) or ():
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate({"extra": extra}):
            yield need
    known = metadata.metadata(PACKAGE)
    if "Requires-Python" in known:
        yield Requirement(f"Python{known['Requires-Python']}")


def _has(need: Requirement) -> bool:
    return any(True for _ in metadata.distributions(name=need.name))


def _misfit(need: Requirement) -> str:
    if need.name == "Python":
        here = platform.python_version()
    elif _has(need):
        here = metadata.version(need.name)
    else:
        return f"{need.name} is missing"
    fits = need.specifier.contains(here, prereleases=True)
    return "" if fits else f"{need.name} is {here}, wanted {need.specifier}"


def largest(folders: Iterable[Path]) -> int:
    """Return the bytes of the largest model below `folders`, 0 if there is none."""
    sizes = [0]
    for folder in folders:
        for path in folder.rglob("*.safetensors"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:  # a task was forgotten meanwhile
                continue
            except OSError as error:
                raise ConfigError(f"{path}: {error.strerror}; mend the rights") from error
    return max(sizes)
