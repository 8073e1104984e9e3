"""Flower is quiet here: `fedml.flower` comes before it."""

import gc
import logging
from collections.abc import Iterator

import pytest

import fedml.flower  # noqa: F401

logging.getLogger("flwr").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _frozen() -> Iterator[None]:
    """Leave what is imported out of garbage collection, which some strategies do a reply."""
    gc.freeze()
    yield
    gc.unfreeze()
