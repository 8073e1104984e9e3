"""Faults without end: `python -m tests.faults.soak --schedules 500`, or `--minutes 30 --runs 2`.

With `--schedules` it plays so many seeded schedules, one after another. With `--minutes` it keeps
`--runs` runs going side by side, under random faults, for so long, and then lets them end in
peace. Either way each run is held against the contract as it ends, and the tally comes last.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedml.protocol.messages import RunId
from fedml.rounds import Plan
from tests.faults.contract import Kept, uphold
from tests.faults.fleet import Fleet, plan
from tests.faults.schedule import Tally, befall, ended, fault, play, schedule

_LONG = 40  # rounds of a run that goes on beside others
_EVERY = 10  # of so many schedules, one goes all the way to the registry
_LIMIT = 600.0  # seconds that the last runs get to end in peace


def schedules(
    fleet: Fleet, first: int, count: int, tally: Tally, say: Callable[[str], None]
) -> None:
    """Play schedules `first` and on. Each failure gets its line."""
    for seed in range(first, first + count):
        story = schedule(seed, minted=seed % _EVERY == _EVERY - 1)
        try:
            play(fleet, story, tally)
        except AssertionError as error:
            tally.failed += 1
            say(f"seed {seed} FAILED: {error}")
            _mend(fleet)
        if (seed - first + 1) % 25 == 0:
            say(f"{seed - first + 1} of {count}: {tally.text().splitlines()[0]}")


def _mend(fleet: Fleet) -> None:
    """Have all programs run again after a failure, so that what follows speaks for itself."""
    for name in ("coordinator", *fleet.sites):
        fleet.disarm(name)
        if not fleet.is_running(name):
            fleet.launch(name)
    fleet.until_all_are_here()
    for info in fleet.ask(lambda c: c.list_runs()):
        if info.state not in ("done", "failed", "stopped"):
            fleet.ask(lambda c, id=info.id: c.stop_run(id))  # type: ignore[misc]


def side_by_side(
    fleet: Fleet, seed: int, minutes: float, runs: int, tally: Tally, say: Callable[[str], None]
) -> None:
    """Keep `runs` runs going under faults for `minutes`."""
    draw, number = random.Random(f"soak {seed}"), 0
    close = time.monotonic() + 60 * minutes
    open_: dict[RunId, Plan] = {}
    kept: list[Kept] = []
    while open_ or time.monotonic() < close:
        while len(open_) < runs and time.monotonic() < close:
            number += 1
            a_plan = plan(1000 * seed + number, private=number % 2 == 0, rounds=_LONG)
            open_[fleet.submit(a_plan)] = a_plan
        if time.monotonic() < close:
            befall(fleet, fault(draw, private=False, rounds=_LONG), list(open_), kept, tally)
        else:
            fleet.until(lambda: ended(fleet, list(open_)), _LIMIT)
            assert ended(fleet, list(open_)), f"{list(open_)} do not end"
        for run in [run for run in open_ if fleet.has_ended(run)]:
            try:
                uphold(fleet, run, open_[run], kept, tally)
                tally.runs += 1
            except AssertionError as error:
                tally.failed += 1
                say(f"{run} FAILED: {error}")
            del open_[run]
            say(f"{run} has ended; {tally.text().splitlines()[0]}")


def main() -> int:
    """Soak, say what came of it, and return 1 if the contract was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--schedules", type=int, default=500)
    parser.add_argument("--minutes", type=float, help="soak so long instead")
    parser.add_argument("--runs", type=int, default=2, help="side by side, with --minutes")
    parser.add_argument("--seed", type=int, default=0, help="the first schedule's")
    parser.add_argument("--folder", type=Path, help="keep everything here, for a look afterwards")
    asked = parser.parse_args()
    tally, began = Tally(), time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    with tempfile.TemporaryDirectory(prefix="fedml-soak-") as place:
        folder = asked.folder or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        with Fleet(folder) as fleet, suppress(KeyboardInterrupt):
            fleet.found()
            if asked.minutes:
                side_by_side(fleet, asked.seed, asked.minutes, asked.runs, tally, say)
            else:
                schedules(fleet, asked.seed, asked.schedules, tally, say)
    say(f"{tally.text()}\n{tally.failed} did not uphold it")
    return min(tally.failed, 1)


if __name__ == "__main__":
    sys.exit(main())
