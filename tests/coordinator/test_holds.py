"""What a run stores is named by what it is, and hashed no more often than need be."""

from __future__ import annotations

from pathlib import Path

import torch

from fedml.coordinator.holds import Holds
from fedml.params import Params
from fedml.transport.chunks import BlobStore, transit_blob


def holds(folder: Path) -> Holds:
    return Holds(BlobStore.in_transit(folder, 2**20))


async def test_a_model_is_named_by_its_digest_known_or_not(tmp_path: Path) -> None:
    values = {"w": torch.arange(5, dtype=torch.float32)}
    known, unknown = Params(values), Params(values)
    digest = known.digest()
    for params in (known, unknown):
        some = holds(tmp_path / str(params is known))
        assert (await some.put({"": params})) == transit_blob(some.store.path(digest))


async def test_a_digest_that_is_known_is_not_found_again(tmp_path: Path) -> None:
    params, some = Params({"w": torch.ones(5)}), holds(tmp_path)
    params.known["digest"] = "7" * 64
    assert (await some.put({"": params})).digest == "7" * 64


async def test_the_digest_of_the_model_is_not_that_of_a_state_with_more(tmp_path: Path) -> None:
    params, some = Params({"w": torch.ones(5)}), holds(tmp_path)
    alone = params.digest()
    blob = await some.put({"": params, "momentum": Params({"w": torch.zeros(5)})})
    assert blob.digest != alone
    assert blob == transit_blob(some.store.path(blob.digest))
