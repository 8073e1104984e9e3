"""Secure aggregation: a site's masking and the coordinator's unmasking beside bare AES-CTR and add.

Nothing travels here: it is what the cryptography costs. `secagg/32x1M` plays whole rounds beside
Flower's SecAgg+, which needs the extra `peers`.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from benchmarks.catalogue import Reading, Say, Skipped, benchmark
from fedml.errors import RoundFailed
from fedml.protocol.messages import RunId, SiteId
from fedml.protocol.secagg import Adverts, Boxes, Consents, Masked, Survivors
from fedml.secagg import Coordinator, Member, Part, Roster, Site, Terms, Total, least_threshold

_SITES, _LARGE, _SMALL = 10, 25_000_000, 1_000_000
_CLIP, _MOST_ERROR = 0.5, 1e-8
_TILE = 2**15  # words: of the sizes from 2^13 to 2^18 the quickest here


class _Federation:
    """Sites with identities, and what each has to sum: one vector, a little larger at each."""

    def __init__(self, sites: int, size: int) -> None:
        self.names = [SiteId(f"site-{number:02}") for number in range(sites)]
        self.identities = {name: Ed25519PrivateKey.generate() for name in self.names}
        keys = {n: key.public_key().public_bytes_raw() for n, key in self.identities.items()}
        self.roster = Roster(tuple(Member(name, key) for name, key in keys.items()))
        draw = np.random.default_rng(0)
        self.base = draw.standard_normal(size, np.float32)
        self.base *= 0.05
        self.weights = dict(zip(self.names, draw.integers(500, 1001, sites) / 1000, strict=True))
        self.round = 0

    def terms(self) -> Terms:
        self.round += 1
        part = Part("delta", len(self.base), _CLIP)
        return Terms(
            RunId("bench"),
            self.round,
            1,
            "ab" * 32,
            self.roster.digest,
            tuple(self.names),
            least_threshold(len(self.names)),
            (part,),
        )

    def values(self, name: SiteId) -> NDArray[np.float32]:
        return self.base * np.float32(1 + 0.01 * self.names.index(name))

    def error(self, total: Total, survivors: Sequence[SiteId]) -> float:
        """Return how far the masked mean is from the plain one, in float64."""
        out = np.empty(len(self.base))
        total.mean_into("delta", out)
        weight = sum(self.weights[name] for name in survivors)
        worst = 0.0
        for start in range(0, len(out), 2**20):
            piece = slice(start, start + 2**20)
            plain = sum(
                self.weights[n]
                * (self.base[piece] * np.float32(1 + 0.01 * self.names.index(n))).astype(np.float64)
                for n in survivors
            )
            worst = max(worst, float(np.abs(out[piece] - plain / weight).max()))
        if worst > _MOST_ERROR:
            raise RoundFailed(f"the masked mean is off by {worst:g}, more than {_MOST_ERROR:g}")
        return worst


class _Watch:
    """Adds up the seconds, by `clock`, of what was done under each name."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._clock = clock

    def time(self, name: str, work: Callable[[], object]) -> None:
        start = self._clock()
        work()
        self.seconds.setdefault(name, []).append(self._clock() - start)


def _round(
    federation: _Federation, threads: int, watch: _Watch, lost: Sequence[SiteId] = ()
) -> tuple[Total, tuple[SiteId, ...]]:
    """Play a whole round; `lost` fall out before their vectors come."""
    terms = federation.terms()
    coordinator = Coordinator(federation.roster, terms, threads=threads)
    sites = {
        name: Site(name, federation.identities[name], federation.roster, terms)
        for name in federation.names
    }
    watch.time("keys and shares", lambda: _agree(coordinator, sites))
    words = np.zeros(terms.grid.length, np.uint32)  # where they lie on their way
    for name, boxes in coordinator.advance().items():
        if name in lost:
            coordinator.lose(name)
            continue
        assert isinstance(boxes, Boxes)
        sites[name].receive(boxes)
        delta, weight = federation.values(name), federation.weights[name]
        watch.time("mask", partial(_fill, words, sites[name], delta, weight, threads))
        watch.time("add", partial(coordinator.take, Masked(terms.context, name), words))
    total: list[Total] = []
    watch.time("unmask", lambda: total.append(_finish(coordinator, sites)))
    return total[0], coordinator.survivors


def _agree(coordinator: Coordinator, sites: dict[SiteId, Site]) -> None:
    for site in sites.values():
        coordinator.take(site.advertise())
    for name, message in coordinator.advance().items():
        assert isinstance(message, Adverts)
        coordinator.take(sites[name].share(message))


def _fill(
    words: NDArray[np.uint32], site: Site, delta: NDArray[np.float32], weight: float, threads: int
) -> None:
    start = 0
    for piece in site.mask({"delta": delta}, weight, threads):
        words[start : start + len(piece)] = piece
        start += len(piece)


def _finish(coordinator: Coordinator, sites: dict[SiteId, Site]) -> Total:
    for name, survivors in coordinator.advance().items():
        assert isinstance(survivors, Survivors)
        coordinator.take(sites[name].consent(survivors))
    for name, consents in coordinator.advance().items():
        assert isinstance(consents, Consents)
        coordinator.take(sites[name].unmask(consents))
    return coordinator.finish()


def _floor(words: NDArray[np.uint32], masks: int, threads: int) -> None:
    """Add `masks` key streams of AES-256-CTR to `words`, and do nothing else."""
    keys = [os.urandom(32) for _ in range(masks)]
    zeros = memoryview(bytes(4 * _TILE))

    def one(first: int, last: int) -> None:
        counter = modes.CTR((first // 4).to_bytes(16, "big"))
        ciphers = [Cipher(algorithms.AES(key), counter).encryptor() for key in keys]
        buffer = bytearray(4 * _TILE + 16)
        stream = np.frombuffer(buffer, np.uint32, _TILE)
        for start in range(first, last, _TILE):
            tile = words[start : min(start + _TILE, last)]
            for cipher in ciphers:
                cipher.update_into(zeros[: tile.nbytes], buffer)
                np.add(tile, stream[: len(tile)], out=tile)

    ends = [len(words) * k // threads // 4 * 4 for k in range(threads)] + [len(words)]
    with ThreadPoolExecutor(threads) as pool:
        deque(pool.map(one, ends[:-1], ends[1:]), maxlen=0)


def _large(quick: bool, say: Say, what: str, masks: int) -> Reading:
    size, threads = (_LARGE // 10 if quick else _LARGE), os.cpu_count() or 1
    federation, watch = _Federation(_SITES, size), _Watch()
    words = np.zeros(size, np.uint32)
    for number in range(1 if quick else 3):
        total, survivors = _round(federation, threads, watch, federation.names[:1])
        error = federation.error(total, survivors)
        del total
        for _ in range(3):
            watch.time("floor", lambda: _floor(words, masks, threads))
        say(f"  round {number + 1}: error {error:.1e}")
    middle = {name: statistics.median(seconds) for name, seconds in watch.seconds.items()}
    least = {f"least {name} s": min(watch.seconds[name]) for name in (what, "floor")}
    others = {f"{name} s": middle[name] for name in ("keys and shares", "mask", "add", "unmask")}
    return Reading(middle[what], middle["floor"], {**least, **others, "error": error})


@benchmark("secagg/client", "s")
def client(quick: bool, say: Say) -> Reading:
    """Measure one of 10 sites rounding and masking 25 M parameters; the limit is 10 bare masks."""
    return _large(quick, say, "mask", _SITES)


@benchmark("secagg/server", "s")
def server(quick: bool, say: Say) -> Reading:
    """Measure unmasking the sum of 9 with one lost, consents and shares; the limit: 18 masks."""
    return _large(quick, say, "unmask", 2 * (_SITES - 1))


@benchmark("secagg/32x1M", "CPU s")
def many(quick: bool, say: Say) -> Reading:
    """Measure whole rounds of 4, 16 and 32 sites in one process; the limit is Flower's at 32.

    CPU seconds of one thread; ours over the complete graph, Flower's with 15 neighbours at 32.
    """
    if importlib.util.find_spec("flwr") is None:
        raise Skipped("flwr is missing: pip install 'fedml-consortium[peers]'")
    from benchmarks.racers import flower_secagg

    size, extra = (_SMALL // 10 if quick else _SMALL), {}
    for sites in (4, 16, 32):
        ours, theirs = [], []
        for _ in range(1 if quick else 3):
            federation, watch = _Federation(sites, size), _Watch(time.process_time)
            total, survivors = _round(federation, 1, watch)
            ours.append(sum(sum(seconds) for seconds in watch.seconds.values()))
            extra[f"error at {sites}"] = federation.error(total, survivors)
            theirs.append(flower_secagg.play(federation.base, sites))
            say(f"  {sites} sites: ours {ours[-1]:.3f} s, Flower's {theirs[-1]:.2f} s")
        value, limit = statistics.median(ours), statistics.median(theirs)
        extra |= {f"{sites} sites s": value, f"Flower's at {sites} s": limit}
    return Reading(value, limit, extra)
