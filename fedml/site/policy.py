"""A site's policy: what its operator allows, in one TOML file that no coordinator can change.

What the file does not allow is refused. A fresh file allows nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from fedml import durable, settings
from fedml.errors import ConfigError
from fedml.privacy.accounting import Unit
from fedml.protocol.apps import Values, read_values
from fedml.protocol.messages import PrivacyMode, check_digest, check_name
from fedml.records import Reader

TEMPLATE = """\
# What this site allows. What is not allowed here is refused, whatever the coordinator asks.

minimum_cohort = 2      # refuse tasks of rounds that ask fewer sites than this
runs_at_once = 4        # work for at most so many runs at a time; others wait their turn
device = "cpu"          # or "cuda", "cuda:1": where training runs
task_seconds = 600      # a task that trains longer is stopped
task_memory_mb = 4096   # a task that takes more memory is stopped
threads = 1             # CPU threads for training
secagg = "allowed"      # or "required": refuse tasks whose answers are not masked
colluders = 0           # other sites that may help the coordinator; masked rounds must bear it

# Recipes are installed here by you; `fedml site recipes` prints names and digests.
# [recipes.breast-cancer]
# digest = "…"                       # SHA-256 of the recipe's source
# file = "recipe.py:MyRecipe"        # only for a recipe of your own, relative to this folder

# [datasets.records]
# train = "data/train.csv"           # rows to train on, relative to this folder
# held_out = "data/held_out.csv"     # other rows, to score models on
# rows = 100                         # your public statement of how many training rows there are
# recipes = ["breast-cancer"]        # which recipes may read it
# privacy = "record"                 # "record": refuse tasks without it; "none": allow them too;
#                                    # "record_distributed": allow sites to share the noise of a
#                                    # masked sum; set `colluders`, for others know their own share
# patients = 40                      # your public statement of how many patients the training
#                                    # rows are of: then budget and privacy ("patient") are theirs
# epsilon = 3.0                      # lifetime budget of each row, at this delta
# delta = 1e-5
# run_epsilon = 1.0                  # of it, at most so much for one run
# site_epsilon = 2.0                 # lifetime budget of this site as a whole, for privacy
#                                    # "site_central": clipped here, noise by the coordinator,
#                                    # or "site_distributed": each site adds its share, masked
# recipe_epsilon = { "breast-cancer" = 2.0 }  # and for all runs of one recipe

# A Flower app; `fedml site allow-app` copies it here and writes this.
# [apps.quickstart]
# digest = "…"                       # of its code and settings
# folder = "apps/quickstart-…"       # the copy, relative to this folder
# privacy = "none"                   # to be said: nothing bounds what its answers tell of rows
# datasets = ["records"]             # whose files it is told; each must have privacy "none" too
# seeded = false                     # true: its chance, and noise, follows from the run's seed
# node_config = { partition-id = 0, num-partitions = 2 }  # what its ClientApp finds there
"""


@dataclass(frozen=True)
class AllowedRecipe:
    """A recipe this site may run: the digest of its source, and its file unless it is built in."""

    digest: str
    file: str = ""

    def __post_init__(self) -> None:
        check_digest("recipe digest", self.digest)


@dataclass(frozen=True)
class Dataset:
    """Rows this site may train on, and what each of them may cost over its lifetime.

    `rows` is public: it fixes sampling rate, denominator and weight, so that the private count
    shows nowhere. Each row lies in `train` or in `held_out`, never in both.
    """

    train: Path
    rows: int
    recipes: tuple[str, ...]
    held_out: Path | None = None
    privacy: PrivacyMode = "record"
    epsilon: float = 0.0
    delta: float = 1e-5
    patients: int = 0
    site_epsilon: float = 0.0
    run_epsilon: float = math.inf
    recipe_epsilon: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, cap in {"run_epsilon": self.run_epsilon, **self.recipe_epsilon}.items():
            if not cap > 0:
                raise ConfigError(f"{key} {cap}: a cap is above 0; leave it out for none")
        if unknown := sorted(self.recipe_epsilon.keys() - {*self.recipes}):
            raise ConfigError(f"recipe_epsilon {unknown}: recipes are {list(self.recipes)}")
        self._check_units()
        by_site = self.privacy in ("site_central", "site_distributed")
        if self.privacy != "none" and not by_site and self.epsilon <= 0:
            raise ConfigError(
                f"epsilon {self.epsilon}: privacy {self.privacy!r} needs a budget above 0"
            )
        if by_site and self.site_epsilon <= 0:
            raise ConfigError(
                f"site_epsilon {self.site_epsilon}: privacy {self.privacy!r} needs a budget above 0"
            )
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta {self.delta}: must lie between 0 and 1")

    def _check_units(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"rows {self.rows}: state a public row count of 1 or more")
        if self.patients < 0:
            raise ConfigError(f"patients {self.patients}: state a public number, or leave it out")
        if self.privacy == "patient" and not self.patients:
            raise ConfigError("privacy 'patient' needs `patients`, your public number of them")
        if self.privacy in ("record", "record_distributed") and self.patients:
            raise ConfigError(
                f"patients {self.patients} with privacy {self.privacy!r}: a budget is about one "
                'kind of unit; say privacy = "patient", or leave patients out'
            )

    @property
    def unit(self) -> Unit:
        """Whom the budget is about."""
        return "patient" if self.patients else "record"

    @property
    def units(self) -> int:
        """How many of them there are to train on, as publicly stated."""
        return self.patients or self.rows


@dataclass(frozen=True)
class AllowedApp:
    """A Flower app this site runs: the digest of its code, and the copy that it runs from.

    What it answers is made of rows by code that no budget bounds, so `privacy` must be "none",
    and must be said. Files of `datasets` are named to it in its node's settings, as
    `NAME.train` and `NAME.held-out`. What it draws at random nobody else knows, unless it is
    `seeded`: then it follows from the run's seed, and with it the noise of Flower's own mods.
    """

    digest: str
    folder: Path
    privacy: Literal["none"]
    datasets: tuple[str, ...] = ()
    node_config: Values = field(default_factory=dict)
    seeded: bool = False

    def __post_init__(self) -> None:
        check_digest("app digest", self.digest)


@dataclass(frozen=True)
class Policy:
    """Everything the operator allows; see `TEMPLATE` for the words."""

    minimum_cohort: int = 2
    runs_at_once: int = 4
    device: str = "cpu"
    task_seconds: float = 600.0
    task_memory_mb: int = 4096
    threads: int = 1
    secagg: Literal["allowed", "required"] = "allowed"
    colluders: int = 0
    recipes: Mapping[str, AllowedRecipe] = field(default_factory=dict)
    datasets: Mapping[str, Dataset] = field(default_factory=dict)
    apps: Mapping[str, AllowedApp] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("minimum_cohort", "runs_at_once", "task_seconds", "task_memory_mb", "threads"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} {getattr(self, name)}: must be above 0")
        if self.colluders < 0:
            raise ConfigError(f"colluders {self.colluders}: 0 or more")
        for name in (*self.recipes, *self.datasets, *self.apps):
            check_name("name", name)
        for name, app in self.apps.items():
            if missing := sorted({*app.datasets} - self.datasets.keys()):
                raise ConfigError(f"apps.{name}: there is no [datasets.{missing[0]}]")
        for name, dataset in self.datasets.items():
            for recipe in dataset.recipes:
                if recipe not in self.recipes:
                    raise ConfigError(
                        f"datasets.{name}: recipe {recipe!r} has no [recipes.{recipe}] entry"
                    )

    @property
    def recipe_files(self) -> Mapping[str, str]:
        """Recipes of the operator's own, name to `file.py:Class`."""
        return {name: recipe.file for name, recipe in self.recipes.items() if recipe.file}


def read_policy(path: Path) -> Policy:
    """Read and check a policy; raises `ConfigError` naming the file, each bad key and its value."""
    readers: Mapping[object, Reader] = {Values: read_values}
    policy = settings.read(Policy, path, absent="run 'fedml site join TOKEN' first", more=readers)
    return _located(policy, path.parent)


def extend(
    path: Path, recipe_name: str, recipe: AllowedRecipe, name: str, dataset: Dataset
) -> None:
    """Add a dataset, and its recipe unless it is there, to the end of a policy file.

    What the operator wrote stays as it is. Raises `ConfigError`, leaving the file alone, if the
    dataset is there already, the recipe is there with another digest, or the result would be odd.
    """
    policy = read_policy(path)
    if name in policy.datasets:
        raise ConfigError(f"{path}: [datasets.{name}] is there already; edit it by hand")
    sections = []
    known = policy.recipes.get(recipe_name)
    if known is None:
        sections.append(_section("recipes", recipe_name, {"digest": recipe.digest}))
    elif known.digest != recipe.digest:
        raise ConfigError(
            f"{path}: [recipes.{recipe_name}] allows {known.digest[:12]}…, installed is "
            f"{recipe.digest[:12]}…; look at what changed, then edit it by hand"
        )
    values = {
        "train": str(dataset.train),
        "held_out": str(dataset.held_out) if dataset.held_out else None,
        "rows": dataset.rows,
        "recipes": list(dataset.recipes),
        "patients": dataset.patients or None,
        "privacy": dataset.privacy,
        "epsilon": dataset.epsilon or None,
        "site_epsilon": dataset.site_epsilon or None,
        "run_epsilon": dataset.run_epsilon if dataset.run_epsilon < math.inf else None,
        "delta": dataset.delta,
    }
    sections.append(_section("datasets", name, values))
    _append(path, sections)


def add_app(path: Path, name: str, app: AllowedApp) -> None:
    """Add a Flower app to the end of a policy file; its folder is written relative to it.

    Raises `ConfigError`, leaving the file alone, if another app has the name, or the result would
    be odd.
    """
    if name in read_policy(path).apps:
        raise ConfigError(f"{path}: [apps.{name}] is there already; take it out by hand first")
    values = {
        "digest": app.digest,
        "folder": str(app.folder.relative_to(path.parent)),
        "privacy": app.privacy,
        "datasets": list(app.datasets) or None,
        "seeded": app.seeded or None,
    }
    sections = [_section("apps", name, values)]
    if app.node_config:
        lines = (f"{json.dumps(k)} = {json.dumps(v)}" for k, v in app.node_config.items())
        sections.append("\n".join([f"[apps.{json.dumps(name)}.node_config]", *lines]) + "\n")
    _append(path, sections)


def _append(path: Path, sections: list[str]) -> None:
    """Add sections to the end of a policy file, if it reads with them."""
    text = path.read_text().rstrip("\n") + "\n\n" + "\n".join(sections)
    draft = path.with_name("policy.toml.new")
    durable.replace(draft, text.encode())
    try:
        read_policy(draft)
        durable.replace(path, text.encode())
    finally:
        draft.unlink(missing_ok=True)


def _section(table: str, name: str, values: Mapping[str, object]) -> str:
    check_name("name", name)
    key = json.dumps(name)  # a JSON string is a TOML one, and names may hold dots
    lines = (f"{k} = {json.dumps(v)}" for k, v in values.items() if v is not None)
    return "\n".join([f"[{table}.{key}]", *lines]) + "\n"


def _located(policy: Policy, folder: Path) -> Policy:
    """Make the policy's paths, written relative to its own folder, absolute."""
    recipes = {
        name: replace(recipe, file=str(folder / recipe.file)) if recipe.file else recipe
        for name, recipe in policy.recipes.items()
    }
    datasets = {
        name: replace(
            dataset,
            train=folder / dataset.train,
            held_out=folder / dataset.held_out if dataset.held_out else None,
        )
        for name, dataset in policy.datasets.items()
    }
    apps = {name: replace(app, folder=folder / app.folder) for name, app in policy.apps.items()}
    return replace(policy, recipes=recipes, datasets=datasets, apps=apps)
