"""A Flower app's round, under ours and under Flower's own runtime, in one run."""

from __future__ import annotations

import importlib.util
import logging
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.catalogue import Reading, Say, Skipped, benchmark


@benchmark("flower/round", "ms")
def round_(quick: bool, say: Say) -> Reading:
    """Measure rounds of a few numbers with two sites, with all that a run keeps.

    The limit is the strategy's and the ClientApp's own work in a bare loop. The same app from the
    same folder is played by a coordinator and two sites of ours, over mutual TLS, and by Flower's
    runtime, a SuperLink and two SuperNodes without TLS; all of them on the loopback.
    """
    if importlib.util.find_spec("flwr") is None:
        raise Skipped("flwr is missing: pip install 'fedml-consortium[flower]'")
    from benchmarks.racers import flower_federation as federation
    from benchmarks.racers import flower_runtime as runtime
    from fedml.flower import simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        app, rounds = runtime.write_app(Path(name)), 20 if quick else 200
        times = Path(name) / "our-times"
        words = (f'rounds={rounds} times="{times}"',)
        setup = simulation.prepare(app, words, runtime.SITES)
        simulation.play(setup, Path(name) / "run")
        ours, limit = statistics.median(runtime.rounds_of(times)), _bare(app, rounds)
        far = statistics.median(federation.play(app, 10 if quick else 50))
        theirs = statistics.median(runtime.play(app, 2 if quick else 5))
    say(f"  simulated {ours * 1e3:.2f} ms, bare loop {limit * 1e3:.2f} ms")
    say(f"  coordinator and sites {far * 1e3:.1f} ms")
    say(
        f"  Flower's runtime {theirs * 1e3:.0f} ms: {theirs / ours:.0f} times a simulated round, "
        f"{theirs / far:.0f} times one over mutual TLS"
    )
    more = {"coordinator and sites ms": far * 1e3, "Flower's runtime ms": theirs * 1e3}
    return Reading(ours * 1e3, limit * 1e3, more)


def _bare(app: Path, rounds: int) -> float:
    """Return the median seconds of a round's own work: FedAvg's and the ClientApp's calls."""
    import numpy as np
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.serverapp.strategy import FedAvg

    from benchmarks.racers.flower_runtime import SITES
    from fedml.flower import app as apps

    client = apps.read(app).load_client()
    contexts = [Context(1, 1000 + k, {}, RecordDict(), {}) for k in range(SITES)]
    strategy, arrays = FedAvg(), ArrayRecord([np.zeros(10, np.float32)])
    seconds = list[float]()
    for number in range(rounds):
        start, replies = time.perf_counter(), list[Message]()
        for context in contexts:
            content = RecordDict({"arrays": arrays, "config": ConfigRecord()})
            message = Message(content, context.node_id, "train")
            replies.append(client(message, context))
        made, _ = strategy.aggregate_train(number, replies)
        assert made is not None
        arrays = made
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
