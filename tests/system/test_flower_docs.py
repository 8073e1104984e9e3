"""What docs/flower.md shows is what happens."""

import json
import re
import shutil
from pathlib import Path

import pytest

from fedml.cli.demo.federation import free_ports
from fedml.params import read
from fedml.recipes.breast_cancer import FEATURES
from tests.system.page import ROOT, play


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_of_the_page_work(tmp_path: Path) -> None:
    text = (ROOT / "docs/flower.md").read_text()
    block, _, _ = re.findall(r"<!-- these commands are run by .*? -->\n```sh\n(.*?)```", text, re.S)
    shutil.copytree(ROOT / "tests/flower/quickstart", tmp_path / "quickstart-pytorch")
    done = play(block, tmp_path, 290)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"^round \d+  .*train: train_loss", done.stdout, re.M)) == 3 + 2
    assert "kept in first/model.safetensors" in done.stdout
    assert json.loads((tmp_path / "second.json").read_text())["server"]["3"]["accuracy"] >= 0
    assert json.loads((tmp_path / "first/run.json").read_text())["sites"] == 4


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_of_the_page_run_the_app_on_sites(tmp_path: Path) -> None:
    text = (ROOT / "docs/flower.md").read_text()
    _, block, _ = re.findall(r"<!-- these commands are run by .*? -->\n```sh\n(.*?)```", text, re.S)
    port, enrolment = free_ports(2)
    told = f"init hub --port {port} --enrolment-port {enrolment}"
    shutil.copytree(ROOT / "tests/flower/quickstart", tmp_path / "quickstart-pytorch")
    done = play(block.replace("init hub", told), tmp_path, 290)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert len(re.findall(r"^round \d  train: train_loss .* evaluate: ", done.stdout, re.M)) == 2
    assert "bern: 0 datasets, 0 recipes, 1 apps" in done.stdout
    assert re.search(r"^exchange 4 \(evaluate\): asked ", done.stdout, re.M)
    assert "receipts verified, head " in done.stdout


@pytest.mark.slow
def test_the_commands_of_the_page_export_a_plan(tmp_path: Path) -> None:
    text = (ROOT / "docs/flower.md").read_text()
    _, _, block = re.findall(r"<!-- these commands are run by .*? -->\n```sh\n(.*?)```", text, re.S)
    (tmp_path / "rows").mkdir()
    header, row = ",".join([*FEATURES, "malignant"]), ",".join(["1"] * len(FEATURES))
    for place in (0, 1):
        lines = [header, *(f"{row},{k % 2}" for k in range(10))]
        (tmp_path / f"rows/{place}.csv").write_text("\n".join(lines) + "\n")
    done = play(block, tmp_path, 200)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert len(re.findall(r"^round \d  train: .*updates 2", done.stdout, re.M)) == 3
    assert read(tmp_path / "my-model.safetensors")[""]


def test_the_page_names_every_option_and_every_file_of_a_run() -> None:
    import typer.main

    from fedml.cli.main import app

    text = (ROOT / "docs/flower.md").read_text()
    command = typer.main.get_command(app)
    for name in ("flower", "run"):
        command = command.commands[name]  # type: ignore[attr-defined]
    for parameter in command.params:
        for option in parameter.opts:
            if option not in ("--json", "--help", "-h") and option.startswith("-"):
                assert f"`{option}" in text, option
