"""Patients for the doctor: a site whose coordinator listens, and what is found of it, by name."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

from fedml import settings as files
from fedml.doctor.examine import examine
from fedml.doctor.finding import Finding
from fedml.identity.certificates import Credentials
from fedml.learning.recipe import identify
from fedml.recipes.breast_cancer import FEATURES
from fedml.site.policy import TEMPLATE, AllowedRecipe, Dataset, extend
from fedml.site.settings import Settings

RECIPE = identify("breast_cancer")


def admit(folder: Path, papers: Credentials) -> Path:
    """Make a site's folder as joining does; its policy allows nothing."""
    papers.save(folder / "identity")
    files.write(Settings("mercy", papers.address, rest_port=0, grpc_port=0), folder / "site.toml")
    (folder / "policy.toml").write_text(TEMPLATE)
    return folder


def allow(
    folder: Path, *, rows: int = 12, digest: str = RECIPE.digest, name: str = "breast_cancer"
) -> Path:
    """Allow a recipe on a file of twelve rows; return the file."""
    path = folder / "train.csv"
    row = ",".join(["1"] * len(FEATURES))
    lines = [",".join([*FEATURES, "malignant"]), *(f"{row},{n % 2}" for n in range(12))]
    path.write_text("\n".join(lines) + "\n")
    dataset = Dataset(path, rows, (name,), epsilon=3.0)
    extend(folder / "policy.toml", name, AllowedRecipe(digest), "records", dataset)
    return path


async def found(folder: Path, clock: Callable[[], float] = time.time) -> dict[str, Finding]:
    """Return the findings by what was looked at; of several, the worst."""
    order = ["ok", "warn", "fail"]
    findings: dict[str, Finding] = {}
    for finding in await examine(folder, clock):
        before = findings.get(finding.what)
        if before is None or order.index(finding.state) > order.index(before.state):
            findings[finding.what] = finding
    return findings


def bad(findings: dict[str, Finding]) -> dict[str, str]:
    """Return what failed, with the whole line."""
    return {w: f"{f.found} -> {f.advice}" for w, f in findings.items() if f.state == "fail"}


def print_of(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Return every file's mode, time and digest."""
    return {
        str(path): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }
