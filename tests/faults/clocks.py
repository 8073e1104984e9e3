"""A program whose clock is wrong, and is set while it runs: three ways to have one.

`libfaketime`, where it is installed, and a shim of our own, where there is a C compiler, mislead
the whole process, TLS with it. The third needs nothing, and misleads Python's `time.time` alone.
None touches the steady clock, as no wrong clock does; but libfaketime cannot sleep through a jump.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

PLACES = ("/usr/lib", "/usr/local/lib", "/usr/lib64")
_SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long off(void) {
    char text[32] = {0};
    int file = open(getenv("WRONG_CLOCK"), O_RDONLY | O_CLOEXEC);
    if (file < 0) return 0;
    ssize_t size = read(file, text, sizeof text - 1);
    close(file);
    return size > 0 ? atol(text) : 0;
}

int clock_gettime(clockid_t id, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, now);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) now->tv_sec += off();
    return status;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *there) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (there) *there = exact.tv_sec;
    return exact.tv_sec;
}
"""
_PYTHON = """
import time
from pathlib import Path

def wrong(real=time.time, path=Path({path!r})):
    return real() + float(path.read_text())

time.time = wrong
"""


class WrongClock:
    """A clock that says what the test sets; a program started with `environment` reads it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._file = folder, folder / "seconds"
        self.environment: Mapping[str, str] = {}
        self.path: Path | None = None  # to come first on the program's Python path
        self.set(0)

    def set(self, seconds: int) -> None:
        """Be so many seconds ahead from now on."""
        draft = self._folder / ".seconds"
        draft.write_text(f"{seconds:+d}")
        draft.rename(self._file)

    def by_libfaketime(self) -> bool:
        """Use libfaketime; False if it is not installed."""
        here = [os.environ.get("LIBFAKETIME", "")]
        here += [
            str(p) for root in PLACES for p in Path(root).glob("*/faketime/libfaketimeMT.so.1")
        ]
        library = next((path for path in here if path and Path(path).exists()), None)
        if library is None:
            return False
        self.environment = {
            "LD_PRELOAD": library,
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        return True

    def by_shim(self) -> bool:
        """Use a shim of our own; False if there is no C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            return False
        source, library = self._folder / "shim.c", self._folder / "shim.so"
        source.write_text(_SHIM)
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
        if subprocess.run(command, capture_output=True).returncode != 0:
            return False
        self.environment = {"LD_PRELOAD": str(library), "WRONG_CLOCK": str(self._file)}
        return True

    def by_python(self) -> bool:
        """Mislead Python alone; always possible."""
        (self._folder / "sitecustomize.py").write_text(_PYTHON.format(path=str(self._file)))
        self.path = self._folder
        return True
