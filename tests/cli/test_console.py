"""What goes wrong on the command line is one line and a status."""

import signal
import subprocess
import sys
import textwrap
import time
from datetime import UTC, datetime

import pytest

from fedml.cli.console import moment
from fedml.errors import ConfigError

NOW = datetime(2030, 1, 31, 12, 0, tzinfo=UTC).timestamp()


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


@pytest.mark.parametrize("ignored", [False, True])
def test_terminated_it_leaves_by_the_way_out(ignored: bool) -> None:
    """A shell's background jobs ignore Ctrl-C; SIGTERM must end them too."""
    code = f"""
        import os, signal, time
        from fedml.cli.console import guarded
        if {ignored}:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        def command():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            finally:
                print("tidied up", flush=True)
        guarded(command)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert (done.stdout, done.stderr) == ("tidied up\n", "stopped\n")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2030-01-31T20:00+01:00", 7 * 3600),
        ("2030-01-31T19:00Z", 7 * 3600),
        ("2030-02-01 04:00:30", 7 * 3600 + 30),
    ],
)
def test_a_time_is_ours_unless_it_says_where(
    text: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "XYZ-9")  # nine hours ahead of UTC
    time.tzset()
    try:
        assert moment(text, NOW) == NOW + seconds
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tomorrow", "write a time as 2030-01-31T20:00, or with an offset"),
        ("2030-02-30T20:00", "write a time as"),
        ("1e9", "write a time as"),
        ("2030-01-31T11:59Z", "has passed, it is 2030-01-31 12:00:00 UTC; leave it out for now"),
        ("2300-01-01T00:00Z", "is more than ten years ahead; is the year right?"),
    ],
)
def test_a_time_that_is_none_has_passed_or_is_a_slip_is_one_line(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match="--at") as caught:
        moment(text, NOW)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
