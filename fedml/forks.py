"""A warm process that forks a child for each job, so that a job starts in milliseconds.

It reads one job a line, and answers with the child's process id and later its exit status. A
crash is one lost job; what a child imports goes with it, unless it is wanted here too.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from fedml.lifeline import die_with_parent

Job = Mapping[str, Any]


def serve(parent: int, do: Callable[[Job], int], wanted: Callable[[Job], Iterable[str]]) -> None:
    """Serve the jobs of `parent`, a process id, until standard input ends.

    A child leaves with what `do` returns. The modules that it finds `wanted` then, of those that
    it imported, the next one finds imported.
    """
    die_with_parent(parent)
    for told in (signal.SIGTERM, signal.SIGINT):  # of a whole service or terminal: to the parent
        signal.signal(told, signal.SIG_IGN)
    worker = os.getpid()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a job that prints must not speak into the protocol
    with tempfile.TemporaryFile(buffering=0) as note:  # shared with the children
        for line in sys.stdin:
            job = json.loads(line)
            note.truncate(0)
            child = os.fork()
            if child == 0:
                die_with_parent(worker)
                answers.close()
                status = do(job)
                os.pwrite(note.fileno(), json.dumps(list(wanted(job))).encode(), 0)
                os._exit(status)
            print(json.dumps({"pid": child}), file=answers)
            _, status = os.waitpid(child, 0)
            print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=answers)
            note.seek(0)
            _import(note.read())


def _import(note: bytes) -> None:
    """Import what a child would have liked to find; what does not import is not there."""
    with suppress(ValueError):  # it was killed before it said
        for name in json.loads(note):
            if name not in sys.modules:
                with suppress(Exception):
                    importlib.import_module(name)
