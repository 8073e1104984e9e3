"""Chance in a simulated app: one stream for the ServerApp, one for each message to a site.

Flower's strategies and most apps draw from the global generators of Python, numpy and torch.
What a site draws must not move what the ServerApp draws next, or a replay, where no site works,
would part from the run that it replays.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from blake3 import blake3


def draw(*key: int) -> int:
    """Return a whole number, 0 or more and below 2^63, that follows from `key` alone."""
    return int.from_bytes(blake3(repr(key).encode()).digest()[:8], "little") >> 1


def sow(whole: int) -> None:
    """Set the three global generators, and those of GPUs, to where `whole` alone says."""
    random.seed(whole)
    np.random.seed(whole % 2**32)
    # not torch.manual_seed: it takes a millisecond to tell accelerators that are not there
    torch.default_generator.manual_seed(whole)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(whole)


def sow_anew() -> None:
    """Set the same generators to where nobody else can know."""
    random.seed(os.urandom(32))
    np.random.seed(np.frombuffer(os.urandom(32), np.uint32))
    torch.default_generator.manual_seed(int.from_bytes(os.urandom(8), "little") >> 1)
    if torch.cuda.is_available():
        torch.cuda.seed_all()


@contextmanager
def apart(whole: int) -> Iterator[None]:
    """Draw from the stream of `whole` meanwhile; the stream from before goes on afterwards."""
    ours, numbers, tensors = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cards = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    sow(whole)
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(numbers)
        torch.set_rng_state(tensors)
        if cards:
            torch.cuda.set_rng_state_all(cards)
