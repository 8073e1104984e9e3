"""Schedules of faults: who is struck, where or when, for how long it is away. A seed is all.

`schedule(seed)` is the same for ever; what it meets depends on the machine's timing, so a point
may be passed before it is armed. `play` counts those apart.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedml.protocol.messages import RunId
from fedml.rounds import Plan
from tests.faults.contract import Kept, keep, uphold
from tests.faults.fleet import COORDINATOR, PATIENCE, SITES, Fleet, plan

_DEATH = 10.0  # seconds within which a program that was struck is no more, or it was a child of it

Points = Mapping[str, int]  # how often each is passed in a run, about
_HUB: Points = {
    "journal.append": 9, "journal.appended": 8, "journal.state": 3, "task.assigned": 8,
    "update.read": 6, "event.taken": 9, "round.committed": 4, "task.forgotten": 8,
    "durable.append": 9, "durable.replace": 3,
}  # fmt: skip
_SITE: Points = {
    "order.noted": 4, "model.fetched": 4, "work.done": 4, "work.charged": 4, "result.kept": 4,
    "update.uploaded": 3, "update.announced": 4, "task.voided": 4, "task.forgetting": 4,
    "durable.replace": 9, "worker.begun": 1, "worker.trained": 1,
}  # fmt: skip
_CHUNKS: Mapping[bool, tuple[Points, Points]] = {  # at the coordinator, at a site
    False: ({"chunk.taken": 18, "chunk.poured": 18, "blob.kept": 6},
            {"chunk.taken": 9, "chunk.poured": 9, "blob.kept": 4}),
    True: ({"chunk.taken": 6, "blob.kept": 6}, {"chunk.poured": 3, "blob.kept": 4}),
}  # fmt: skip
_LEDGER: Points = {"ledger.append": 8, "ledger.appended": 8, "durable.append": 8}
_MINT: Points = {"version.pressed": 1, "version.staged": 1, "version.noted": 1}
WORKER = "worker"  # a strike: SIGKILL to a site's worker process


@dataclass(frozen=True)
class Fault:
    """A strike at `who` as `failpoints` knows it, WORKER, or "" for SIGKILL; `after` seconds.

    What died is started again after `away` seconds.
    """

    who: str
    strike: str
    after: float
    away: float


@dataclass(frozen=True)
class Schedule:
    """A run, and what befalls it."""

    seed: int
    plan: Plan
    faults: tuple[Fault, ...]

    @property
    def is_private(self) -> bool:
        return self.plan.privacy.mode == "record"


@dataclass
class Tally:
    """What schedules came to; `back` has the seconds from each restart to the next record."""

    runs: int = 0
    failed: int = 0  # runs that did not uphold it
    struck: dict[str, int] = field(default_factory=dict)
    missed: int = 0
    asked_again: int = 0
    back: list[float] = field(default_factory=list)

    def strike(self, what: str) -> None:
        """Count a fault that happened."""
        self.struck[what] = self.struck.get(what, 0) + 1

    def text(self) -> str:
        """Return the tally for a person."""
        faults = sum(self.struck.values())
        lines = [
            f"{self.runs} runs upheld the contract under {faults} faults ({self.missed} more came "
            f"too late); {self.asked_again} rounds were asked again"
        ]
        if self.back:
            middle = sorted(self.back)[len(self.back) // 2]
            lines.append(
                f"a coordinator's restart: {len(self.back)} times, next record after "
                f"{middle:.1f} s, at most {max(self.back):.1f} s"
            )
        lines += [f"  {count:4}  {what}" for what, count in sorted(self.struck.items())]
        return "\n".join(lines)


def schedule(seed: int, *, minted: bool = False, rounds: int = 3) -> Schedule:
    """Return the schedule of a seed: every second run is private; 1 to 3 faults."""
    draw = random.Random(f"schedule {seed}")
    private = bool(seed % 2) and not minted
    faults = [fault(draw, private=private) for _ in range(draw.randint(1, 3))]
    if minted:
        faults.append(Fault(COORDINATOR, f"{draw.choice([*_MINT])}:1:kill", 0.0, draw.random()))
    a_plan = plan(seed, private=private, minted=minted, rounds=rounds)
    return Schedule(seed, a_plan, tuple(faults))


def fault(draw: random.Random, *, private: bool, rounds: int = 3) -> Fault:
    """Draw one fault."""
    who = draw.choice([COORDINATOR, COORDINATOR, *SITES])
    away = draw.choice([0.0, draw.uniform(0, 1), draw.uniform(0, 1), draw.uniform(2, 3)])
    if draw.random() < 0.3:
        strike = WORKER if who != COORDINATOR and draw.random() < 0.4 else ""
        return Fault(who, strike, draw.uniform(0, 1.5), away)
    hub, site = _CHUNKS[private]
    points = {**_HUB, **hub} if who == COORDINATOR else {**_SITE, **site}
    if private and who != COORDINATOR:
        points |= _LEDGER
    point = draw.choice(sorted(points))
    count = draw.randint(1, max(1, points[point] * rounds // 6))
    action = "kill"
    if draw.random() < 0.15:
        action = f"delay={draw.uniform(0.2, 3.0):.2f}"
    elif point in ("durable.replace", "durable.append", "chunk.taken") and draw.random() < 0.4:
        action = "enospc"
    return Fault(who, f"{point}:{count}:{action}", 0.0, away)


def play(fleet: Fleet, story: Schedule, tally: Tally) -> RunId:
    """Submit the run, do what the schedule says, and uphold the contract; return the run.

    Raises `AssertionError` with the schedule when something in the contract does not hold.
    """
    run = fleet.submit(story.plan)
    kept: list[Kept] = []
    try:
        for each in story.faults:
            befall(fleet, each, [run], kept, tally)
        fleet.finish(run)
        uphold(fleet, run, story.plan, kept, tally)
    except Exception as error:
        raise AssertionError(f"{run} under {story}: {error}") from error
    tally.runs += 1
    return run


def befall(
    fleet: Fleet, each: Fault, runs: Sequence[RunId], kept: list[Kept], tally: Tally
) -> None:
    """Let one fault happen, and start again what died of it; nothing if all `runs` end before."""
    fleet.until(lambda: ended(fleet, runs), each.after)
    what = _strike(fleet, each, runs)
    if not what:
        tally.missed += 1
        return
    if _is_deadly(each) and not fleet.until(lambda: not fleet.is_running(each.who), _DEATH):
        what = what.replace("site", "site worker", 1)  # it writes files as the daemon does
    tally.strike(what)
    if fleet.is_running(each.who):
        return
    fleet.bury(each.who)
    kept += [keep(fleet, run) for run in runs]
    fleet.until(lambda: False, each.away)
    revive(fleet, each.who, runs, tally)


def revive(fleet: Fleet, who: str, runs: Sequence[RunId], tally: Tally) -> None:
    """Start a program again; a coordinator's way back is timed."""
    known = {run: len(fleet.journal(run)) for run in runs}
    began = time.monotonic()
    fleet.launch(who)
    if who != COORDINATOR:
        return
    fleet.wait_for(COORDINATOR, lambda: fleet.ask(lambda c: c.list_runs()))
    if not ended(fleet, runs):
        fleet.wait_for(COORDINATOR, lambda: any(len(fleet.journal(r)) > known[r] for r in runs))
        tally.back.append(time.monotonic() - began)


def ended(fleet: Fleet, runs: Sequence[RunId]) -> bool:
    """True if the end of all these runs is on the disk."""
    return all(fleet.has_ended(run) for run in runs)


def _strike(fleet: Fleet, each: Fault, runs: Sequence[RunId]) -> str:
    """Strike, or arm and wait until that struck; return what did, "" if the runs end before."""
    if ended(fleet, runs):
        return ""
    if each.strike == WORKER:
        worker = fleet.worker(each.who)
        if worker is not None:
            worker.kill()
        return "site worker"
    role = "coordinator" if each.who == COORDINATOR else "site"
    if not each.strike:
        fleet.slay(each.who)
        return f"{role} at a moment"
    fleet.arm(each.who, each.strike)
    fleet.until(lambda: not fleet.is_armed(each.who) or ended(fleet, runs), PATIENCE)
    if fleet.is_armed(each.who):
        fleet.disarm(each.who)
        return ""
    point, _, action = each.strike.split(":")
    return f"{role} {point} {action.partition('=')[0]}"


def _is_deadly(each: Fault) -> bool:
    """True if the program itself died, not only its worker, or nobody."""
    if each.strike == WORKER or each.strike.startswith("worker."):
        return False
    return each.strike == "" or each.strike.endswith(":kill")
