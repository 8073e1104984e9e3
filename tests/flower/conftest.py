"""Flower is quiet here: `fedml.flower` comes before it.

When it is first imported, Flower sets how much gRPC says, for all programs too that this one
starts; other tests read what those say.
"""

import gc
import logging
import os
from collections.abc import Iterator

import pytest

import fedml.flower

_KNOWN = "GRPC_VERBOSITY" in os.environ
import flwr.serverapp  # noqa: E402, F401

if not _KNOWN:
    os.environ.pop("GRPC_VERBOSITY", None)
assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0", fedml.flower
logging.getLogger("flwr").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _frozen() -> Iterator[None]:
    """Leave what is imported out of garbage collection, which some strategies do a reply."""
    gc.freeze()
    yield
    gc.unfreeze()
