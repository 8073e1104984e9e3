"""What goes wrong on the command line is one line and a status."""

import subprocess
import sys


def fedml(*arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys\nsys.modules.update({{name: None for name in {without.split()!r}}})\n"
        "from fedml.cli.main import main\nmain()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_missing_extra_says_what_to_install() -> None:
    done = fedml("simulate", without="hydra")
    assert done.returncode == 1
    assert done.stderr.startswith("error: hydra is not installed")
    assert "pip install 'fedml-consortium[site]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_wrong_usage_is_status_2() -> None:
    done = fedml("coordinator", "invite")
    assert done.returncode == 2
    assert "Missing argument 'NAME'" in done.stderr


def test_a_disk_s_error_is_one_line() -> None:
    done = fedml("site", "check", "/proc/self/mem")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
