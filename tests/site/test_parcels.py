"""A site takes the fewest bytes that it can use, and ends with the very model it was ordered.

The far end of the link is the test; the worker is real, and so is what it trains.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from fedml.errors import Refused
from fedml.learning.recipe import identify
from fedml.params import Params, encode, read
from fedml.protocol.messages import (
    Assignment,
    Blob,
    Forget,
    Hello,
    Parcel,
    Privacy,
    RunId,
    TaskId,
    Trained,
    Training,
)
from fedml.protocol.parcels import pack, rounded, unpack
from fedml.site.policy import AllowedRecipe, Dataset, Policy
from fedml.transport.chunks import BlobStore
from tests.faults.light import Light
from tests.site.wire import Wire, running

RECIPE = {"light": f"{Path(__file__).parents[1] / 'faults' / 'light.py'}:Light"}
ROWS = "1,0,0,0,1\n0,1,0,0,0\n0,0,1,0,1\n-1,0,0,0,0\n"


@dataclass
class Shop(Wire):
    """A wire that hands out what the test has put there, and says what was asked for."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    told: list[Hello] = field(default_factory=list)
    before: dict[str, Callable[[], None]] = field(default_factory=dict)  # a blob is handed out

    async def connect(self, hello: Hello) -> None:
        self.told.append(hello)
        await super().connect(hello)

    async def download(self, blob: Blob, into: BlobStore) -> None:
        self.asked.append(blob.digest)
        self.before.pop(blob.digest, lambda: None)()
        if blob.digest not in self.blobs:
            raise Refused(f"blob {blob.digest[:12]} is not for you")
        assert into.put_bytes(self.blobs[blob.digest]) == blob

    def put(self, data: bytes) -> Blob:
        blob = Blob(blake3(data).hexdigest(), len(data))
        self.blobs[blob.digest] = data
        return blob


@dataclass
class Town:
    """A site's folder, what it is sent, and the models of two rounds."""

    folder: Path
    shop: Shop
    models: tuple[Params, Params]
    wholes: tuple[Blob, Blob]

    def parcel(self, form: str, number: int, base: int | None = None) -> Parcel:
        """Put a parcel of a model into the shop."""
        paths = [self.folder / f"model{n}" for n in (0, 1)]
        for path, model in zip(paths, self.models, strict=True):
            path.write_bytes(b"".join(encode({"": model})))
        other = paths[base] if base is not None else None
        data = b"".join(pack(paths[number], form, other))
        return Parcel(
            form, self.shop.put(data), self.wholes[base].digest if base is not None else ""
        )

    def order(self, number: int, *parcels: Parcel, **changes: object) -> Assignment:
        order = Assignment(
            task=TaskId(f"run-1.{number + 1}.1.bern"), run=RunId("run-1"), round=number + 1,
            kind="train", recipe=identify("light", RECIPE), dataset="rows",
            model=self.wholes[number], training=Training(lr=0.05, steps=2), privacy=Privacy(),
            cohort=3, parcels=parcels, keep_model=True,
        )  # fmt: skip
        return replace(order, **changes)  # type: ignore[arg-type]

    async def trained(self, order: Assignment) -> Trained:
        """Give an order; return the answer to it, and what was asked for meanwhile in `asked`."""
        self.shop.asked.clear()
        self.shop.say(order)
        while (answer := await self.shop.event(Trained)).task != order.task:
            pass
        return answer

    def update(self, answer: Trained) -> Params:
        """Return the delta that a site has handed in."""
        data, place = self.shop.uploads[-1], self.folder / "handed"
        assert answer.sent == Blob(blake3(data).hexdigest(), len(data))
        if not answer.parcels:
            place.write_bytes(data)
            return read(place)["delta"]
        (self.folder / "came").write_bytes(data)
        unpack(self.folder / "came", answer.parcels[0].form, answer.update, place)
        return read(place)["delta"]


@pytest.fixture
def town(tmp_path: Path) -> Town:
    generator = torch.Generator().manual_seed(1)
    first = Params(
        {
            k: torch.randn(v.shape, generator=generator)
            for k, v in Light().build().state_dict().items()
        }
    )
    models, shop = (first, first * 1.0001), Shop()
    one, two = (shop.put(b"".join(encode({"": model}))) for model in models)
    (tmp_path / "rows.csv").write_text(ROWS)
    return Town(tmp_path, shop, models, (one, two))


@asynccontextmanager
async def site(town: Town) -> AsyncIterator[None]:
    digest = identify("light", RECIPE).digest
    policy = Policy(
        recipes={"light": AllowedRecipe(digest, RECIPE["light"])},
        datasets={"rows": Dataset(town.folder / "rows.csv", 4, ("light",), privacy="none")},
    )
    async with running(town.folder / "site", town.shop, policy):
        yield


def digests(*blobs: Blob) -> Sequence[str]:
    return [blob.digest for blob in blobs]


async def expected(town: Town) -> Params:
    """Return the delta of the second round as a site makes it that got everything whole."""
    other = replace(town, folder=town.folder / "other")
    other.folder.mkdir()
    shutil.copy(town.folder / "rows.csv", other.folder)
    async with site(other):
        return other.update(await other.trained(other.order(1)))


async def test_the_difference_to_the_model_before_is_all_that_comes(town: Town) -> None:
    wanted = await expected(town)
    delta, plain = town.parcel("delta", 1, 0), town.parcel("zstd", 1)
    async with site(town):
        await town.trained(town.order(0))
        assert town.shop.asked == digests(town.wholes[0])
        town.shop.say(Forget(TaskId("run-1.1.1.bern"), counted=True))
        answer = await town.trained(town.order(1, delta, plain))
        assert town.shop.asked == digests(delta.blob)
    assert town.update(answer) == wanted
    assert delta.blob.size < plain.blob.size < town.wholes[1].size


async def test_after_a_restart_the_model_before_is_still_there(town: Town) -> None:
    async with site(town):
        await town.trained(town.order(0))
        town.shop.say(Forget(TaskId("run-1.1.1.bern"), counted=True))
    delta = town.parcel("delta", 1, 0)
    async with site(town):
        await town.trained(town.order(1, delta))
        assert town.shop.asked == digests(delta.blob)


async def test_who_joins_late_takes_the_next_best_parcel(town: Town) -> None:
    wanted = await expected(town)
    delta, plain = town.parcel("delta", 1, 0), town.parcel("zstd", 1)
    async with site(town):
        answer = await town.trained(town.order(1, delta, plain))
        assert town.shop.asked == digests(plain.blob)
        assert not (town.folder / "site" / "blobs" / plain.blob.digest).exists()  # it is unpacked
    assert town.update(answer) == wanted


async def test_the_very_model_that_is_there_does_not_come_again(town: Town) -> None:
    async with site(town):
        await town.trained(town.order(0))
        again = town.order(0, task=TaskId("run-1.1.2.bern"))
        await town.trained(again)
        assert town.shop.asked == []


async def test_a_kept_model_that_a_power_loss_spoilt_is_of_no_use_and_no_harm(town: Town) -> None:
    wanted = await expected(town)
    delta = town.parcel("delta", 1, 0)
    async with site(town):
        await town.trained(town.order(0))
        [kept] = (town.folder / "site" / "models" / "run-1").iterdir()
        data = kept.read_bytes()
        kept.unlink()
        kept.write_bytes(data[:-8] + bytes(8))
        await town.trained(town.order(0, task=TaskId("run-1.1.2.bern")))
        assert town.shop.asked == digests(town.wholes[0])
        [kept] = (town.folder / "site" / "models" / "run-1").iterdir()
        kept.unlink()
        kept.write_bytes(data[:-8] + bytes(8))
        answer = await town.trained(town.order(1, delta))
        assert town.shop.asked == digests(delta.blob, town.wholes[1])
    assert town.update(answer) == wanted


async def test_a_kept_model_that_goes_while_it_is_needed_costs_a_whole_one(
    town: Town, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted, delta = await expected(town), town.parcel("delta", 1, 0)
    models = town.folder / "site" / "models"
    async with site(town):
        await town.trained(town.order(0))
        town.shop.before[delta.blob.digest] = lambda: shutil.rmtree(models)
        answer = await town.trained(town.order(1, delta))
        assert town.shop.asked == digests(delta.blob, town.wholes[1])
    assert town.update(answer) == wanted
    assert "Traceback" not in "".join(capfd.readouterr())


async def test_a_model_that_cannot_be_kept_costs_no_task(town: Town) -> None:
    wanted = await expected(town)
    async with site(town):
        (town.folder / "site" / "models").write_text("in the way")
        answer = await town.trained(town.order(1))
    assert town.update(answer) == wanted


@pytest.mark.parametrize("spoil", ["garbage", "another model", "withheld", "a newer form"])
async def test_a_parcel_of_no_use_costs_a_whole_model_and_no_more(town: Town, spoil: str) -> None:
    wanted, good = await expected(town), town.parcel("zstd", 1)
    bad = {
        "garbage": lambda: replace(good, blob=town.shop.put(b"garbage")),
        "another model": lambda: town.parcel("zstd", 0),
        "withheld": lambda: replace(good, blob=Blob("ab" * 32, 9)),
        "a newer form": lambda: replace(good, form="int4"),
    }[spoil]()
    async with site(town):
        answer = await town.trained(town.order(1, bad))
        assert town.shop.asked[-1] == town.wholes[1].digest
        assert (bad.blob.digest in town.shop.asked) == (spoil != "a newer form")
    assert town.update(answer) == wanted


async def test_without_deltas_no_model_is_kept(town: Town) -> None:
    async with site(town):
        await town.trained(town.order(0, keep_model=False))
        assert not (town.folder / "site" / "models").exists()


async def test_a_run_that_is_over_leaves_no_model(town: Town) -> None:
    async with site(town):
        await town.trained(town.order(0))
        town.shop.say(Forget(TaskId("run-1.1.1.bern"), counted=True))
    async with site(town):
        models = town.folder / "site" / "models"
        assert len(list(models.rglob("*/*"))) == 1
        town.shop.say(Forget(TaskId("run-1.over"), False, "run-1"))
        await town.trained(town.order(0, run=RunId("run-2"), task=TaskId("run-2.1.1.bern")))
        assert [path.name for path in models.iterdir()] == ["run-2"]


async def test_a_site_tells_of_runs_whose_model_it_has(town: Town) -> None:
    async with site(town):
        await town.trained(town.order(0))
        town.shop.say(Forget(TaskId("run-1.1.1.bern"), counted=True))
        await town.trained(town.order(1))
    async with site(town):
        assert [hello.runs for hello in town.shop.told] == [(), (RunId("run-1"),)]


# --- updates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("up", ["zstd", "bf16", "bf16+zstd"])
async def test_an_update_comes_up_as_it_is_wanted(town: Town, up: str) -> None:
    whole = await expected(town)
    async with site(town):
        answer = await town.trained(town.order(1, up=up))
    [parcel] = answer.parcels
    assert parcel.form == up.split("+")[-1]
    assert parcel.blob.size < answer.update.size
    assert town.update(answer) == (rounded(whole) if "bf16" in up else whole)


@pytest.mark.parametrize("up", ["", "int4+gzip"])
async def test_an_update_goes_whole_if_nothing_else_is_known(town: Town, up: str) -> None:
    whole = await expected(town)
    async with site(town):
        answer = await town.trained(town.order(1, up=up))
    assert not answer.parcels
    assert town.update(answer) == whole


async def test_what_is_kept_is_what_is_sent_again(town: Town) -> None:
    order = town.order(1, up="bf16+zstd")
    async with site(town):
        first = await town.trained(order)
    async with site(town):
        assert await town.trained(replace(order, parcels=(town.parcel("zstd", 1),))) == first
    assert len(town.shop.uploads) == 2
    assert len(set(town.shop.uploads)) == 1
    assert not town.shop.asked  # nothing was done again
