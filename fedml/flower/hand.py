"""Runs ClientApps at a site: started by its daemon, which never imports one.

`python -m fedml.flower.hand DAEMON` forks a child for each message (`fedml.forks`). The child
holds the app's folder against the digest of the order, lets the ClientApp answer, and leaves the
reply, the context after it, and `outcome.json` last in the task's folder.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict

from fedml import durable, failpoints, forks
from fedml.errors import ConfigError, FedmlError
from fedml.flower import app as apps
from fedml.flower import private
from fedml.flower.answer import answer
from fedml.flower.grid import RUN
from fedml.flower.randomness import sow, sow_anew
from fedml.protocol import codec
from fedml.protocol.apps import FIRST_NODE, AppTerms
from fedml.protocol.messages import Assignment

_before = frozenset(sys.modules)


def main() -> None:
    """Serve jobs until standard input ends. The argument is the process id of the daemon."""
    forks.serve(int(sys.argv[1]), _do, _wanted)


def _wanted(job: Mapping[str, Any]) -> Iterable[str]:
    """Return the packages that the app has imported, but nothing of its own folder."""
    own = f"{Path(job['app']).resolve()}/"
    fresh = [(name, sys.modules[name]) for name in list(sys.modules) if name not in _before]
    files = ((name, getattr(module, "__file__", None) or own) for name, module in fresh)
    return [name for name, file in files if not file.startswith(own)]


def _do(job: Mapping[str, Any]) -> int:
    """Return 0 when the reply is on the disk, 1 with `error.json` when there is none."""
    folder = Path(job["folder"])
    try:
        torch.set_num_threads(int(job["threads"]))
        _answer(job, folder)
    except FedmlError as error:
        text = str(error)
    except BaseException as error:  # noqa: BLE001 - the outermost loop of this process
        traceback.print_exc()
        text = f"{type(error).__name__}: {error}".splitlines()[0]
    else:
        return 0
    durable.replace(folder / "error.json", durable.dump_json({"error": text, "told": True}))
    return 1


def _answer(job: Mapping[str, Any], folder: Path) -> None:
    failpoints.reach("worker.begun")
    order = codec.decode(Assignment, (folder / "assignment").read_bytes())
    terms, place = AppTerms.from_json(order.app), Path(job["app"])
    app = apps.read(place)
    if app.digest() != order.recipe.digest:
        raise ConfigError(
            f"policy apps.{order.recipe.name}.folder = {place}: its files are not those of the "
            "digest; allow the app again"
        )
    now, id_ = time.time(), f"{terms.node}-{terms.messages}"
    message = private.addressed(Path(job["model"]).read_bytes(), terms.node, id_, now)
    private.act_as(RUN, terms.node)
    context = _context(job, terms)
    client = app.load_client()
    if job["seeded"]:
        sow(order.seed)
    else:
        sow_anew()
    reply, failure = answer(client, message, context, terms.node - FIRST_NODE)
    if failure is not None and failure.trace:
        print(failure.trace, file=sys.stderr)  # the site's own log
    durable.replace(folder / "update.safetensors", private.message_bytes(reply))
    durable.replace(folder / "memory.safetensors", private.context_bytes(context))
    failpoints.reach("worker.trained")
    outcome = {"weight": 1.0, "metrics": {}}
    durable.replace(folder / "outcome.json", durable.dump_json(outcome))


def _context(job: Mapping[str, Any], terms: AppTerms) -> Context:
    """Return the run's context at this site as the last message left it, or a fresh one.

    Where the site is and how it is set up is today's; only the state is from before.
    """
    kept = Path(job["slots"])
    state = private.read_context(kept.read_bytes()).state if kept.exists() else RecordDict()
    return Context(RUN, terms.node, dict(job["node_config"]), state, dict(terms.config))


if __name__ == "__main__":
    main()
