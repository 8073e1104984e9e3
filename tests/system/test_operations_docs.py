"""docs/operations.md takes an operator from nothing to a site, and out again: all its commands run.

The wheel is built and installed as the page says. Only pip's way out is closed: what the wheel
needs comes from the environment of the tests.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import click
import pytest

from fedml.cli.demo.federation import free_ports
from fedml.cli.demo.hospitals import SPLIT_SEED, admit
from tests.system.page import ROOT, check_fedml, commands, is_elsewhere, words

PAGE = "docs/operations.md"
FEDML = "/opt/fedml/current/bin/fedml"
NOT_RUN_HERE = (  # they need root, systemd or Docker; below they are checked in other ways
    "docker build -f docker/Dockerfile --target site -t fedml-site .",
    "docker run --rm -v bern:/data fedml-site site join TOKEN --dir /data",
    "docker run -d --name bern -v bern:/data -v /srv/records:/records:ro"
    " -p 127.0.0.1:8400:8400 fedml-site",
    "docker exec bern fedml doctor /data",
    "sudo systemd-sysusers deploy/systemd/fedml.conf",
    "sudo install -m 644 deploy/systemd/fedml-site.service /etc/systemd/system/",
    "sudo install -d -o fedml -g fedml -m 700 /var/lib/fedml-site",
    f"sudo -u fedml {FEDML} site join TOKEN --dir /var/lib/fedml-site",
    "sudo systemctl enable --now fedml-site",
    f"sudo -u fedml {FEDML} doctor /var/lib/fedml-site",
    "sudo systemd-sysusers deploy/systemd/fedml.conf",
    "sudo install -m 644 deploy/systemd/fedml-coordinator.service /etc/systemd/system/",
    "sudo install -d -o fedml -g fedml -m 700 /var/lib/fedml-coordinator",
    f"sudo -u fedml {FEDML} coordinator init /var/lib/fedml-coordinator"
    " --host hub.example.org --bind 0.0.0.0",
    "sudo systemctl enable --now fedml-coordinator",
    f"sudo -u fedml {FEDML} doctor /var/lib/fedml-coordinator",
)


def checkout(folder: Path) -> None:
    """Make `folder` the top of the project's source, as far as a wheel is made of it."""
    hide = shutil.ignore_patterns("__pycache__")
    for name in ("fedml", "configs", "hydra_plugins", "simulations"):
        shutil.copytree(ROOT / name, folder / name, ignore=hide)
    for name in ("pyproject.toml", "requirements.lock", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)


def script(folder: Path, rest: int) -> str:
    """Return the page's own commands, with the names at its top set to what is free here."""
    admit("breast_cancer", None, folder / "hospitals", SPLIT_SEED)
    grpc, port, newcomers = free_ports(3)
    ours: dict[str, object] = {
        "FEDML": folder / "opt", "SITE": folder / "site", "HUB": folder / "hub",
        "DATA": folder / "hospitals/bern/data",
        "REST": rest, "GRPC": grpc, "PORT": port, "NEWCOMERS": newcomers, "HOST": "localhost",
    }  # fmt: skip
    text = "\n".join(c for c in commands(PAGE) if not is_elsewhere(c))
    head, body = text.split("python3 -m pip wheel", 1)
    for name, value in ours.items():
        head, count = re.subn(rf"\b{name}=\S+", f"{name}={value}", head)
        assert count == 1, name
    return f"{head}python3 -m pip wheel{body}"


def run(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    programs = folder / "bin"
    programs.mkdir()
    (programs / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (programs / "python3").chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    watch = "trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR; trap 'jobs -p | xargs -r kill' EXIT"
    return subprocess.run(
        [bash, "-c", f"set -eu -o pipefail; {watch}\n{text}"],
        cwd=folder / "source",
        env={
            "PATH": f"{programs}:/usr/bin:/bin",
            "HOME": str(folder),
            "PYTHONPATH": sysconfig.get_paths()["purelib"],
            "PIP_NO_INDEX": "1",
            "PIP_NO_DEPS": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=390,
    )


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_every_command_of_the_page_does_what_it_says(tmp_path: Path) -> None:
    source = tmp_path / "source"
    checkout(source)
    [rest_port] = free_ports(1)
    done = run(tmp_path, script(tmp_path, rest_port))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    logs = done.stderr + "".join((source / f"{n}.log").read_text() for n in ("coordinator", "site"))
    assert "Traceback" not in logs
    installed = (tmp_path / "opt").glob("*/lib/python3*/site-packages/fedml/__init__.py")
    assert len({path.resolve() for path in installed}) == 3  # one of them is the current one
    said = done.stdout
    assert said.count("bern has joined localhost:") == 2
    prints = re.findall(r"authority +SHA-256 ([0-9a-f]{64}), expires in", said)
    assert len(set(prints)) == 1
    assert len(prints) >= 6
    assert "\nfail" not in said
    assert "a site daemon (process " in said
    assert said.count("breast_cancer: epsilon 0.000 of 3.5 spent") == 2
    assert "\n503\n" in said
    assert "fedml_sites_connected" in said
    assert "bern has left localhost:" in said
    assert "operator eve: good until " in said
    with tarfile.open(source / "site-backup.tgz") as backup:
        kept = {name.split("/")[1] for name in backup.getnames() if "/" in name}
    assert kept >= {"identity", "policy.toml", "secret", "site.toml", "trust"}
    assert kept.isdisjoint({"ledger", "tasks", "slots", "blobs"})
    assert (source / "site-backup.tgz").stat().st_mode & 0o77 == 0
    settings = tomllib.loads((tmp_path / "site/site.toml").read_text())
    assert settings["rest_port"] == rest_port


def test_what_is_not_run_here_is_listed() -> None:
    told = [re.sub(r"\s+#.*", "", c) for c in commands(PAGE) if is_elsewhere(c)]
    assert tuple(told) == NOT_RUN_HERE


@pytest.mark.parametrize("command", [c for c in NOT_RUN_HERE if c.startswith("docker ")])
def test_docker_s_commands_fit_the_dockerfile_and_the_command_line(command: str) -> None:
    _, verb, *rest = words(command)
    if verb == "build":
        targets = re.findall(r"^FROM .* AS (\S+)", (ROOT / "docker/Dockerfile").read_text(), re.M)
        assert rest[rest.index("--target") + 1] in targets
        assert (ROOT / rest[rest.index("-f") + 1]).exists()
    elif verb == "exec":
        assert rest[1] == "fedml"
        check_fedml(rest[2:])
    elif arguments := rest[rest.index("fedml-site") + 1 :]:
        check_fedml(arguments)


@pytest.mark.parametrize("command", [c for c in NOT_RUN_HERE if c.startswith("sudo ")])
def test_root_s_commands_fit_the_files_and_the_command_line(command: str) -> None:
    _, verb, *rest = words(command)
    units = ROOT / "deploy/systemd"
    match verb:
        case "systemctl":
            assert (units / f"{rest[-1]}.service").exists()
        case "systemd-sysusers":
            assert (ROOT / rest[0]).read_text().splitlines()[-1].startswith("u fedml ")
        case "install" if rest[0] == "-m":
            assert (ROOT / rest[2]).exists()
        case "install":
            unit = units / f"{Path(rest[-1]).name}.service"
            assert f"ReadWritePaths={rest[-1]}\n" in unit.read_text()
        case _:
            assert rest[:2] == ["fedml", FEDML]
            check_fedml(rest[2:])


def test_a_command_that_is_none_would_be_noticed() -> None:
    with pytest.raises(click.UsageError):
        check_fedml(["site", "jion", "TOKEN"])
    with pytest.raises(click.UsageError):
        check_fedml(["site", "join", "TOKEN", "--folder", "x"])
