"""Packages of other people: real ones, as pip leaves them in a folder of the path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "tiny"
version = "1.2"
[tool.hatch.build.targets.wheel]
packages = ["tiny"]
"""
OFFERED = {
    "fedml.strategies": {"tiny": "tiny.algorithms:Tiny"},
    "fedml.rules": {"shrink": "tiny.algorithms:Shrink"},
    "fedml.statistics": {"tilt": "tiny.algorithms:Tilt"},
    "fedml.reducers": {"middle": "tiny.algorithms:Middle"},
    "fedml.recipes": {"tiny_cancer": "tiny.recipe:TinyCancer"},
    "fedml.executors": {"backwards": "tiny.machines:Backwards"},
    "fedml.registries": {"tiny": "tiny.machines:Shelves"},
}
FILES = {
    "algorithms.py": '''
"""An algorithm with both halves, a statistic, and a robust rule."""

from dataclasses import dataclass, field, replace

from fedml.protocol.tasks import Brief
from fedml.strategies import Aggregate, FedAvg, Plain, Reducer, ServerState, WeightedMean
from fedml.strategies.robust import Median


@dataclass(frozen=True)
class Tiny:
    """FedAvg whose sites follow `shrink`, or measure by `tilt`."""

    factor: float = 0.5
    tilts: bool = False
    reducer: Reducer = field(default_factory=WeightedMean)

    def start(self, params):
        return ServerState(params)

    def brief(self, state):
        rule = "tilt" if self.tilts else "shrink"
        return Brief(state.params, rule=rule, settings={"factor": self.factor})

    def advance(self, state, total):
        return ServerState(state.params + total.delta, step=state.step + 1)


class Shrink(Plain):
    """Steps along a part of the gradient."""

    def gradient(self, brief, memory, params, grads):
        return grads * brief.settings["factor"]


class Tilt:
    """Reports a small delta, whatever the rows."""

    def reports(self, brief):
        return frozenset()

    def measure(self, brief, sample):
        return brief.params * 0.0 + brief.params * brief.settings["factor"], {}


@dataclass(frozen=True, kw_only=True)
class Middle(Median):
    """The median under another name."""
''',
    "recipe.py": '''
"""A recipe like one of ours."""

from fedml.recipes.breast_cancer import BreastCancer


class TinyCancer(BreastCancer):
    """The very same."""
''',
    "machines.py": '''
"""An executor and a registry."""

from dataclasses import dataclass

from fedml.releases.registry import MemoryRegistry
from fedml.simulation.executors.inline import Inline


@dataclass
class Backwards(Inline):
    """The reference, last site first."""

    said: str = "backwards"

    def run(self, tasks):
        print(f"{self.said}: {len(tasks)} tasks")
        return super().run(tasks[::-1])


class Shelves(MemoryRegistry):
    """A registry in memory, with a place."""

    def __init__(self, place, folder):
        super().__init__(folder)
        self.place = place
''',
    "__init__.py": '"""Adds to fedml."""\n',
}


def build(source: Path) -> None:
    """Write the project of the package `tiny`."""
    (source / "tiny").mkdir(parents=True)
    for name, text in FILES.items():
        (source / "tiny" / name).write_text(text.lstrip("\n"))
    groups = (
        "\n".join(
            [f'[project.entry-points."{group}"]', *(f'{n} = "{t}"' for n, t in offered.items())]
        )
        for group, offered in OFFERED.items()
    )
    (source / "pyproject.toml").write_text("\n".join([PROJECT, *groups, ""]))


def install(source: Path, target: Path) -> None:
    """Build a project and put it where it can be imported, as a user does."""
    words = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    pip = [sys.executable, "-m", "pip", "install", *words, "--target", str(target), str(source)]
    subprocess.run(pip, check=True, capture_output=True, text=True, timeout=150)


def register(folder: Path, package: str, offered: Mapping[str, Mapping[str, str]]) -> None:
    """Leave what pip leaves of a package's entry points, and nothing else of it."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = []
    for group, things in offered.items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in things.items())]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]))
