"""Reads a site's data files by the recipes of its policy, in a process of its own, and counts.

`python -m fedml.doctor.rows POLICY` writes one JSON object a file. Recipes are the operator's
code: they must not end the doctor, nor speak into its report.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fedml.errors import FedmlError
from fedml.learning.recipe import Recipe, installed, load
from fedml.protocol.messages import RecipeId
from fedml.site.policy import Dataset, read_policy


def main() -> None:
    """Read every file of the policy that is the argument."""
    policy = read_policy(Path(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    here = installed(policy.recipe_files)

    def tell(**answer: object) -> None:
        print(json.dumps(answer), file=answers)

    if policy.device.startswith("cuda"):
        import torch

        tell(device=policy.device, usable=torch.cuda.is_available())
    for name, dataset in policy.datasets.items():
        wanted = [RecipeId(r, policy.recipes[r].digest) for r in dataset.recipes]
        recipe = next((r for r in wanted if r in here), None)
        if recipe is None:
            continue
        for part, path in _parts(dataset):
            try:
                reader = load(recipe, policy.recipe_files)
                tell(dataset=name, part=part, recipe=recipe.name, rows=_count(reader, path))
            except FedmlError as error:
                tell(dataset=name, part=part, error=str(error))
            except Exception as error:  # noqa: BLE001 - a recipe may raise anything
                text = f"{type(error).__name__}: {error}".splitlines()[0]
                tell(dataset=name, part=part, error=f"recipe {recipe.name}: {text}")


def _parts(dataset: Dataset) -> list[tuple[str, Path]]:
    parts = [("train", dataset.train)]
    return [*parts, ("held_out", dataset.held_out)] if dataset.held_out else parts


def _count(recipe: Recipe, path: Path) -> int:
    return len(recipe.read(path))


if __name__ == "__main__":
    main()
