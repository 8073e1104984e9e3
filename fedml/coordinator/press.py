"""The press: makes the first parameters of a recipe, and bundles of trained ones.

Both need the recipe's code and seconds of torch, so they run in a child process of their own,
`python -m fedml.coordinator.press COORDINATOR JOB`; the coordinator itself imports no recipe.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedml import durable
from fedml.errors import FedmlError, TaskFailed, Unreachable
from fedml.lifeline import die_with_parent
from fedml.protocol.messages import RecipeId

if TYPE_CHECKING:
    from fedml.releases.manifest import Manifest

_PATIENCE = 300.0  # seconds for one job
_EXAMPLE_ROWS = 64
_AGAIN = 75  # exit status of a child for whom trying again is right, as in sysexits(3)


async def initial_params(recipe: RecipeId, seed: int, path: Path) -> None:
    """Write a fresh model's parameters to `path`; raises `TaskFailed` with the recipe's error."""
    await _run({"do": "init", "recipe": _plain(recipe), "seed": seed, "path": str(path)})


async def bundle(recipe: RecipeId, weights: Path, facts: Manifest, card: str, folder: Path) -> None:
    """Write the bundle of the parameters in `weights` to `folder`, with its privacy card.

    `facts` is the manifest as far as the coordinator knows it. Raises `TaskFailed`.
    """
    durable.replace(folder / "facts.json", facts.encode())
    job = {"do": "bundle", "recipe": _plain(recipe), "weights": str(weights), "folder": str(folder),
           "card": card}  # fmt: skip
    try:
        await _run(job)
    finally:
        (folder / "facts.json").unlink(missing_ok=True)


def _plain(recipe: RecipeId) -> Mapping[str, str]:
    return {"name": recipe.name, "digest": recipe.digest}


async def _run(job: Mapping[str, Any]) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fedml.coordinator.press",
        str(os.getpid()),
        json.dumps(job),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        async with asyncio.timeout(_PATIENCE):
            output, _ = await child.communicate()
    except TimeoutError as error:
        raise TaskFailed(f"the press took more than {_PATIENCE:.0f} s over {job['do']}") from error
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        text = output.decode(errors="replace").strip().splitlines()
        kind = Unreachable if child.returncode == _AGAIN else TaskFailed
        raise kind(text[-1] if text else f"the press ended with status {child.returncode}")


def _init(job: Mapping[str, Any]) -> None:
    import torch

    from fedml.learning.recipe import load
    from fedml.params import Params, encode

    torch.manual_seed(job["seed"])
    module = load(RecipeId(**job["recipe"])).build()
    durable.replace(Path(job["path"]), *encode({"": Params(module.state_dict())}))


def _bundle(job: Mapping[str, Any]) -> None:
    from fedml.learning.recipe import load
    from fedml.params import read
    from fedml.releases.bundle import build
    from fedml.releases.manifest import Manifest

    folder, recipe = Path(job["folder"]), load(RecipeId(**job["recipe"]))
    facts = Manifest.decode((folder / "facts.json").read_bytes())
    params = read(Path(job["weights"]))[""]
    build(folder, recipe.build(), params, recipe.example(_EXAMPLE_ROWS), facts,
          card=job["card"])  # fmt: skip


def main() -> None:
    """Do the one job on the command line, after the process id of the coordinator.

    An error is the last line of standard output.
    """
    die_with_parent(int(sys.argv[1]))
    job = json.loads(sys.argv[2])
    try:
        {"init": _init, "bundle": _bundle}[job["do"]](job)
    except FedmlError as error:
        print(error)
        sys.exit(_AGAIN if isinstance(error, Unreachable) else 1)


if __name__ == "__main__":
    main()
