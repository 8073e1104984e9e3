"""What is freed is allocated again without new pages; what is large comes in few."""

from __future__ import annotations

import ctypes
import mmap
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fedml import pages

_CHUNKS = """
import resource, sys
from fedml import pages

if sys.argv[1] == "keep":
    pages.keep_freed(2**25, arenas=2)


def churn():
    for _ in range(50):
        chunks = [bytes(2**20) for _ in range(8)]
        del chunks


churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str) -> int:
    command = [sys.executable, "-c", _CHUNKS, what]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="malloc is not glibc's")
def test_chunks_take_the_place_of_those_before_them() -> None:
    chunk = 2**20 // mmap.PAGESIZE
    assert faults("keep") < chunk  # 400 chunks came and went
    assert faults("") > 10 * chunk  # else this machine shows nothing


def test_large_memory_is_zeroed_and_takes_few_pages_where_there_are_large_ones() -> None:
    size = 2**25
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = pages.large(size)
    memory[:: mmap.PAGESIZE] = b"1" * (size // mmap.PAGESIZE)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert sum(memory[:: mmap.PAGESIZE]) == ord("1") * (size // mmap.PAGESIZE)
    assert memory[1] == memory[-1] == 0
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no large pages")
    assert taken < size // mmap.PAGESIZE // 4
