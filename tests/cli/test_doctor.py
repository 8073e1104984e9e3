"""`fedml doctor` prints a line a finding, and its status says whether anything failed."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from fedml.cli.main import app
from fedml.coordinator.folder import create
from fedml.coordinator.settings import Settings


def test_lines_json_and_status(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    create(hub, Settings(port=0, enrolment_port=0))
    well = CliRunner().invoke(app, ["doctor", str(hub)])
    assert well.exit_code == 0, well.output
    lines = well.output.splitlines()
    assert all(line.startswith(("ok  ", "warn")) for line in lines)
    start = f"fedml coordinator run {hub}"
    assert lines[0] == f"warn  program         is not running -> start it: {start}"
    (hub / "ca" / "ca.json").chmod(0o644)
    ill = CliRunner().invoke(app, ["doctor", str(hub), "--json"])
    assert ill.exit_code == 1
    findings = [json.loads(line) for line in ill.output.splitlines()]
    assert {"state", "what", "found", "advice"} == set(findings[0])
    assert [f["what"] for f in findings if f["state"] == "fail"] == ["modes"]


def test_without_a_folder_it_looks_at_the_profile(tmp_path: Path) -> None:
    create(tmp_path / "hub", Settings(port=1, enrolment_port=2))
    profile = {"FEDML_PROFILE": str(tmp_path / "hub" / "operator")}
    looked = CliRunner().invoke(app, ["doctor"], env=profile)
    assert looked.exit_code == 1
    assert "operator admin" in looked.output
    assert "localhost:1 does not answer: Connection refused" in looked.output
