"""After a masked round, the coordinator's whole memory and log hold no single site's update.

The coordinator's half runs in a process of its own, a curious one that keeps all it is sent. It
then searches its own memory for what each site put in. A site whose masks are taken out is found.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from fedml.params import Params
from fedml.protocol.messages import RunId, SiteId
from fedml.protocol.secagg import Secagg
from fedml.protocol.tasks import Brief, Update
from fedml.rounds import MaskedRound, Opening, Relay, Said, vectors
from fedml.rounds.round import Close, SendTask
from fedml.secagg import Roster, Site
from fedml.secagg.masking import Mask
from fedml.simulation.veil import Veil
from fedml.strategies import Aggregate
from tests.secagg.worlds import plain_words

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/mem")

SITES = tuple(SiteId(name) for name in ("bern", "kyoto", "lima", "oslo"))
VICTIM = SITES[1]
SA1 = Secagg("sa1", clip=0.5, weight_cap=100.0)
OPENING = Opening(RunId("run-1"), 1, 1, SITES, quorum=3, deadline=60.0)
BRIEF = Brief(Params({"w": torch.zeros(200_000)}))
_NEEDLE = 64  # bytes, from several places of an update


def updates() -> dict[SiteId, Update]:
    found = {}
    for place, site in enumerate(SITES):
        draw = torch.Generator().manual_seed(place)
        delta = Params({"w": torch.rand(200_000, generator=draw) - 0.5})
        found[site] = Update(OPENING.task_id(site), 1, site, delta, 10.0 + place)
    return found


def needles(veil: Veil) -> dict[str, bytes]:
    """Return what is looked for: floats and ring words of each site, from places in its update."""
    found = {}
    for site, update in updates().items():
        floats = update.delta["w"].numpy()
        values = vectors.numbers_of(update, BRIEF, SA1)
        words = plain_words(values, update.weight / SA1.weight_cap, veil.terms(BRIEF))
        for what, array in (("numbers", floats), ("words", words)):
            for start in (16, 70_000, 199_000):
                raw = array[start:].tobytes()[:_NEEDLE]
                found[f"{site}'s {what} at {start}"] = raw
    return found


def coordinate(pipe: Connection, roster: Roster, log: Path) -> None:
    """Host the coordinator's half; then find in this process what the parent names.

    Needles come backwards, so that asking for one does not put it here.
    """
    logging.basicConfig(filename=log, level=logging.DEBUG)
    round_ = MaskedRound(OPENING, SA1, roster)
    pipe.send(round_.open(BRIEF))
    kept = []
    while True:
        said = pipe.recv()
        if not isinstance(said, Said):
            break
        commands = round_.handle(said)
        logging.debug("%s: %r", round_.progress, commands)
        pipe.send(commands)
        kept.append(said)
    regions = list(memory())
    names = [
        name for name, reverse in said.items() if any(_holds(region, reverse) for region in regions)
    ]
    pipe.send((names, len(kept)))


def memory() -> Iterator[bytes]:
    """Yield what is in each writable stretch of this process's memory."""
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as mem:
        spans = [re.match(r"(\w+)-(\w+) rw", line) for line in maps]
        for span in filter(None, spans):
            start, end = (int(place, 16) for place in span.groups())
            try:
                mem.seek(start)
                yield mem.read(end - start)
            except OSError:
                continue  # the kernel's own


def _holds(region: bytes, reverse: bytes) -> bool:
    """True if `region` has `reverse` read backwards, of which no copy is made."""
    first = reverse[-8:][::-1]
    place = region.find(first)
    while place >= 0:
        if region[place : place + len(reverse)] == reverse[::-1]:
            return True
        place = region.find(first, place + 1)
    return False


def play(log: Path) -> tuple[Sequence[str], object]:
    """Play a round between this process, with all sites, and a coordinator's; then search it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    veil = Veil(SA1, SITES)
    veil.open(OPENING)
    child = context.Process(target=coordinate, args=(theirs, veil.roster, log))
    child.start()
    tasks = [c.task for c in ours.recv() if isinstance(c, SendTask)]
    answers: list[object] = [veil.begin(task) for task in tasks]
    trained, total = updates(), object()
    while answers:
        ours.send(answers.pop(0))
        for command in ours.recv():
            if isinstance(command, Close):
                total = command.total
            if isinstance(command, Relay):
                answers.append(veil.hear(command) or veil.mask(trained[command.site]))
    ours.send({name: raw[::-1] for name, raw in needles(veil).items()})
    found, kept = ours.recv()
    child.join(30)
    assert (child.exitcode, kept) == (0, 5 * len(SITES))
    return found, total


@pytest.mark.timeout(120)
@pytest.mark.parametrize("leaking", [False, True], ids=["masked", "mutated"])
def test_the_coordinator_s_memory_and_log_hold_no_site_s_update(
    leaking: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Site._masks

    def masks(site: Site) -> list[Mask]:
        return [] if site.me == VICTIM else honest(site)

    if leaking:
        monkeypatch.setattr(Site, "_masks", masks)
    found, total = play(tmp_path / "log")
    log = (tmp_path / "log").read_bytes()
    assert b"unmasking the sum of 4 of 4 sites" in log
    if leaking:
        assert any(name.startswith(f"{VICTIM}'s words") for name in found)
        return
    assert found == [] and isinstance(total, Aggregate)
    weights = [one.weight for one in updates().values()]
    mean = sum(
        (u.delta["w"].double() * u.weight for u in updates().values()), torch.zeros(200_000)
    ) / sum(weights)
    assert (total.delta["w"].double() - mean).abs().max() < 4e-8
    veil = Veil(SA1, SITES)
    veil.open(OPENING)
    for raw in needles(veil).values():
        assert raw not in log and raw.hex().encode() not in log


def test_a_needle_that_is_there_is_found() -> None:
    needle = np.random.default_rng(0).bytes(_NEEDLE)
    kept = bytearray(10_000) + needle
    reverse = needle[::-1]
    assert any(_holds(region, reverse) for region in memory())
    assert not _holds(bytes(kept), np.random.default_rng(1).bytes(_NEEDLE))
