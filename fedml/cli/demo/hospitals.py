"""The demonstration's hospitals: who they are, what lies in each one's folder, what each allows."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedml.errors import ConfigError

DELTA = 1e-5
BUDGET = 3.6  # lifetime epsilon of a row: one run at 3, and a little of a second one
SPLIT_SEED = 596
_ALPHA, _HELD_OUT = 0.5, 0.25
_BREAST_CANCER_SITES = ("bern", "kyoto", "oslo", "quito")
_HEART_SITES = ("cleveland", "hungarian", "switzerland", "va")


@dataclass(frozen=True)
class Hospital:
    """One hospital: its name, how many rows it has of each kind, and its data files' ending."""

    name: str
    train: int
    held_out: int
    ending: str

    def file(self, folder: Path, part: str) -> Path:
        """Return where `part`, "train" or "held_out", lies below the hospital's own folder."""
        return folder / "data" / f"{part}{self.ending}"


@dataclass(frozen=True)
class Case:
    """A dataset to demonstrate: its recipe, its hospitals, and the plan's settings for it."""

    recipe: str
    title: str
    hospitals: tuple[Hospital, ...]
    overrides: tuple[str, ...]
    note: str


def admit(data: str, data_dir: Path | None, folders: Path, split_seed: int) -> Case:
    """Deal the rows out into each hospital's own folder below `folders`, and return the case.

    Raises `ConfigError` for an unknown dataset or a missing file.
    """
    if data == "breast_cancer":
        return _breast_cancer(folders, split_seed)
    if data == "heart":
        return _heart(data_dir, folders, split_seed)
    raise ConfigError(f"--data {data!r}: use 'breast_cancer' or 'heart'")


def _breast_cancer(folders: Path, seed: int) -> Case:
    """scikit-learn's 569 records, dealt out with Dirichlet label skew."""
    from fedml.learning.recipe import identify, load
    from fedml.recipes.breast_cancer import FEATURES
    from fedml.recipes.partition import dirichlet_label_skew
    from fedml.simulation.population import ShippedData

    rows = ShippedData("breast_cancer").rows(load(identify("breast_cancer")))
    sites = _BREAST_CANCER_SITES
    dealt = dirichlet_label_skew(rows.y.numpy(), len(sites), _ALPHA, seed)
    hospitals = []
    for site, own in zip(sites, dealt, strict=True):
        train, held_out = rows.take(own.tolist()).divide(_HELD_OUT, seed=seed)
        hospital = Hospital(site, len(train), len(held_out), ".csv")
        for part, some in (("train", train), ("held_out", held_out)):
            table = [[*x, y] for x, y in zip(some.x.tolist(), some.y.tolist(), strict=True)]
            _write(hospital.file(folders / site, part), [[*FEATURES, "malignant"], *table])
        hospitals.append(hospital)
    overrides = ("task=breast_cancer", "privacy=record", "training.lr=0.5", "privacy.clip=0.5")
    note = f"scikit-learn's records, dealt out with Dirichlet label skew {_ALPHA}, seed {seed}."
    if seed == SPLIT_SEED:
        note += (
            " That split was chosen, among many, because nobody alone does well on it and a "
            "federation does; docs/demo.md says what others give."
        )
    return Case("breast_cancer", "Breast cancer, four hospitals", tuple(hospitals), overrides, note)


def _heart(data_dir: Path | None, folders: Path, seed: int) -> Case:
    """The four real hospitals' files, rows with missing values left out, a third held out."""
    import random

    if data_dir is None:
        raise ConfigError("--data heart needs --data-dir, the folder with processed.*.data")
    hospitals = []
    for site in _HEART_SITES:
        path = data_dir / f"processed.{site}.data"
        if not path.exists():
            path = data_dir / "heart_disease_uci" / path.name
        lines = _complete_lines(path)
        random.Random(seed).shuffle(lines)
        held = round(len(lines) * 0.34)
        hospital = Hospital(site, len(lines) - held, held, ".data")
        for part, some in (("held_out", lines[:held]), ("train", lines[held:])):
            _write(hospital.file(folders / site, part), some)
        hospitals.append(hospital)
    overrides = ("task=heart_disease", "privacy=record", "training.lr=1.0", "privacy.clip=0.5")
    note = (
        "UCI Heart Disease (Janosi, Steinbrunn, Pfisterer and Detrano): each hospital its own file."
    )
    return Case(
        "heart_disease", "Heart disease, four real hospitals", tuple(hospitals), overrides, note
    )


def _complete_lines(path: Path) -> list[list[str]]:
    """Return the rows that miss nothing the recipe needs (it drops columns 10 to 12)."""
    try:
        with path.open(newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; name the folder with the four hospitals' files"
        ) from error
    return [row for row in rows if "?" not in (*row[:10], *row[13:])]


def _write(path: Path, table: Sequence[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(table)


def allow(case: Case, hospital: Hospital, folder: Path) -> list[str]:
    """Return the command by which this hospital allows one recipe on its rows, within a budget."""
    return [
        "site", "allow", str(folder),
        "--dataset", case.recipe,
        "--recipe", case.recipe,
        "--train", str(hospital.file(folder, "train")),
        "--held-out", str(hospital.file(folder, "held_out")),
        "--rows", str(hospital.train),
        "--epsilon", str(BUDGET),
        "--delta", str(DELTA),
    ]  # fmt: skip
