"""`fedml demo` shows what it promises; its summary is what the promises are read from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def played(folder: Path, *options: str) -> dict[str, object]:
    command = [sys.executable, "-m", "fedml", "demo", "--folder", str(folder), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text())
    assert json.loads(done.stdout) == summary
    return summary


def check(summary: dict[str, object], folder: Path) -> None:
    sites = summary["sites"]
    assert isinstance(sites, list)
    assert len(sites) == 4
    assert len({site["release"] for site in sites}) == 1
    assert all(0 < site["epsilon"] <= site["budget"] for site in sites)
    assert all(site["epsilon"] <= 3.0 + 1e-6 for site in sites)
    assert all(site["offline_predictions"] == site["held_out"] > 0 for site in sites)
    second = summary["second_run"]
    assert isinstance(second, dict)
    assert second["state"] == "stopped"
    assert second["refusals"]
    report = (folder / "report.html").read_text()
    assert "<svg" in report
    assert "src=" not in report  # nothing to load from anywhere
    assert not running_below(folder)


def running_below(folder: Path) -> list[str]:
    """Return the command lines of processes that still work in `folder`."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, ValueError):
            continue
        if str(folder) in line and process.name != str(os.getpid()):
            found.append(line)
    return found


@pytest.mark.timeout(300)
def test_four_hospitals_train_release_serve_crash_and_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    summary = played(folder)
    check(summary, folder)
    sites, accuracy = summary["sites"], summary["federated_accuracy"]
    assert isinstance(sites, list)
    assert isinstance(accuracy, float)
    assert accuracy >= 0.94
    assert accuracy > max(site["local_accuracy"] for site in sites)


@pytest.mark.timeout(300)
def test_the_four_real_hospitals_do_as_well(tmp_path: Path) -> None:
    data = os.environ.get("FEDML_DATA")
    if not data or not (Path(data) / "heart_disease_uci").is_dir():
        pytest.skip("set FEDML_DATA to the folder with heart_disease_uci/")
    folder = tmp_path / "demo"
    summary = played(folder, "--data", "heart", "--data-dir", data)
    check(summary, folder)
    sites = summary["sites"]
    assert isinstance(sites, list)
    assert {site["site"] for site in sites} == {"cleveland", "hungarian", "switzerland", "va"}
    accuracy = summary["federated_accuracy"]
    assert isinstance(accuracy, float)
    assert accuracy >= 0.7


def test_told_to_stop_it_leaves_nothing_running(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    words = tmp_path / "words"
    with words.open("wb") as file:
        demo = subprocess.Popen(
            [sys.executable, "-m", "fedml", "demo", "--folder", str(folder)],
            stderr=file,
            stdout=file,
        )
    try:
        while "training under" not in words.read_text():
            assert demo.poll() is None, words.read_text()
            time.sleep(0.05)
        assert running_below(folder)
        demo.send_signal(signal.SIGTERM)
        assert demo.wait(60) == 143
        assert "Traceback" not in words.read_text()
        assert not [line for line in running_below(folder) if "fedml" in line]
    finally:
        demo.kill()
        demo.wait()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    command = [sys.executable, "-m", "fedml", "demo", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path} holds other files; name an empty --folder\n"
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "stars"], "error: --data 'stars': use 'breast_cancer' or 'heart'\n"),
        (["--data", "heart"], "error: --data heart needs --data-dir, the folder with processed"),
        (["--data", "heart", "--data-dir", "/nowhere"], "/nowhere/heart_disease_uci/processed.cl"),
    ],
)
def test_wrong_options_are_one_line(tmp_path: Path, options: list[str], message: str) -> None:
    command = [sys.executable, "-m", "fedml", "demo", "--folder", str(tmp_path / "d"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
