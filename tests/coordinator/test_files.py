"""A coordinator asks for as many open files as it may have: each site takes a few."""

import subprocess
import sys

_SCRIPT = """
import resource, sys
from fedml.coordinator.service import allow_files
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
allow_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def limits(soft: int, hard: int) -> list[str]:
    """Return what a program with these limits prints: warnings, and its soft limit at last."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(soft), str(hard)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_the_limit_is_raised_as_far_as_it_may_be() -> None:
    assert limits(256, 5000) == ["5000"]


def test_a_hard_limit_that_is_too_low_is_one_line_with_the_way_out() -> None:
    warning, limit = limits(256, 600)
    assert limit == "600"
    assert "LimitNOFILE" in warning
    assert "200" in warning  # sites
