"""A site's masked tasks: one session each, one answer to each word, shares once for each sum."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedml import durable
from fedml.coordinator import veil
from fedml.errors import (
    ConfigError,
    Corrupt,
    FedmlError,
    MalformedMessage,
    Refused,
    TaskFailed,
    Untrusted,
)
from fedml.protocol.messages import (
    Assignment,
    Failed,
    Privacy,
    SecaggSaid,
    SecaggTold,
    SiteEvent,
    SiteId,
)
from fedml.protocol.secagg import Masked, Masking, Part, Secagg
from fedml.secagg import Coordinator, Demands, Terms, Total
from fedml.site import masks
from fedml.site.door import Door, open_ledgers
from fedml.site.gate import decide
from fedml.site.masks import Masks
from fedml.site.memory import Desk, Memory
from tests.site.wire import ORDER, RECIPE, policy, worked

SITES = tuple(SiteId(name) for name in ("bern", "kyoto", "oslo"))
BERN = SITES[0]
PARTS = (Part("delta:float32", 1000, 0.5), Part("metric loss", 1, 10.0, fine=True))
MASKING = Masking(1, SITES, 3, PARTS, Secagg("sa1", clip=0.5, weight_cap=10.0))
MASKED_ORDER = replace(ORDER, masking=MASKING.to_json())


class Town:
    """Three sites' folders with one roster, their `Masks`, and the coordinator's half."""

    def __init__(self, folder: Path) -> None:
        self.folders = {site: folder / site for site in SITES}
        keys = {s: masks.identity(f).public_key() for s, f in self.folders.items()}
        text = durable.dump_json({s: key.public_bytes_raw().hex() for s, key in keys.items()})
        for site, place in self.folders.items():
            self.roster = masks.accept(place, site, text, "roster.json")
        self.said: dict[SiteId, list[SiteEvent]] = {site: [] for site in SITES}
        self.masks = {site: self.start(site) for site in SITES}
        self.coordinator = self.attempt(MASKED_ORDER)

    def attempt(self, order: Assignment) -> Coordinator:
        terms = Terms.of(order, Masking.from_json(order.masking), self.roster)
        return Coordinator(self.roster, terms, threads=1)

    def start(self, site: SiteId) -> Masks:
        async def tell(event: SiteEvent) -> None:
            self.said[site].append(event)

        return Masks(self.folders[site], site, Demands(), tell)

    async def begin(self, order: Assignment = MASKED_ORDER) -> None:
        for one in self.masks.values():
            one.open(order, known=False)
            await one.advertise(order)
        self.collect()

    def collect(self) -> None:
        for site in SITES:
            event = self.said[site][-1]
            assert isinstance(event, SecaggSaid), event
            self.coordinator.take(veil.said(site, event).message)

    async def step(self) -> dict[SiteId, SecaggTold]:
        told = {
            site: veil.told(ORDER.task, message)
            for site, message in self.coordinator.advance().items()
        }
        for site, one in told.items():
            await self.masks[site].hear(one)
        return told

    async def vectors(self) -> None:
        for place, site in enumerate(SITES):
            parts = leave_vector(self.folders[site], place)
            path = await self.masks[site].mask(MASKED_ORDER, self.folders[site], parts, 5.0)
            assert not (self.folders[site] / "vector").exists()
            message = Masked(self.coordinator.terms.context, site)
            self.coordinator.take(message, np.fromfile(path, np.uint32))

    async def play(self) -> Total:
        await self.begin()
        await self.step()
        self.collect()
        await self.step()
        await self.vectors()
        for _ in range(2):
            await self.step()
            self.collect()
        return self.coordinator.finish()


def leave_vector(folder: Path, place: int) -> list[list[object]]:
    delta = np.full(1000, 0.1 * (place + 1), np.float32)
    metric = np.array([1.0 + place])
    (folder / "vector").write_bytes(delta.tobytes() + metric.tobytes())
    return [["delta:float32", "float32", 1000], ["metric loss", "float64", 1]]


@pytest.fixture
def town(tmp_path: Path) -> Town:
    return Town(tmp_path)


async def test_a_round_over_the_wire_s_words_sums(town: Town) -> None:
    total, out = await town.play(), np.empty(1000)
    total.mean_into("delta:float32", out, 1)
    assert np.abs(out - 0.2).max() < 1e-8
    assert total.mean("metric loss")[0] == pytest.approx(2.0)


async def test_a_word_that_comes_again_has_the_same_answer(town: Town) -> None:
    """A stream that breaks has the coordinator say its last word once more."""
    await town.begin()
    bern, said = town.masks[BERN], town.said[BERN]
    await bern.advertise(MASKED_ORDER)
    assert said[-1] == said[-2]
    for phase in range(4):
        told = await town.step()
        before, count = said[-1], len(said)
        await bern.hear(told[BERN])
        assert said[-1] == before
        if phase == 1:
            await town.vectors()
            continue
        assert len(said) == count + 1
        town.collect()
    town.coordinator.finish()


async def test_a_second_list_of_survivors_ends_the_session(town: Town) -> None:
    await town.begin()
    await town.step()
    town.collect()
    await town.step()
    await town.vectors()
    [told, *_] = (await town.step()).values()
    other = replace(told, data=told.data[:-1] + b"x")
    bern = town.masks[BERN]
    await bern.hear(replace(other, word="consents"))
    assert isinstance(town.said[BERN][-1], Failed)
    await bern.hear(told)
    last = town.said[BERN][-1]
    assert isinstance(last, Failed) and "this site has no session for that round" in last.reason


async def test_a_site_that_was_started_again_takes_no_further_part(town: Town) -> None:
    await town.begin()
    told = await town.step()
    again = town.start(BERN)
    await again.hear(told[BERN])
    last = town.said[BERN][-1]
    assert isinstance(last, Failed) and "it was started again" in last.reason
    with pytest.raises(TaskFailed, match="the keys of its masked round went"):
        again.open(MASKED_ORDER, known=True)
    with pytest.raises(TaskFailed, match="session was ended"):
        await again.mask(MASKED_ORDER, town.folders[BERN], [], 1.0)


async def test_shares_are_given_once_for_a_sum_also_after_a_restart(town: Town) -> None:
    await town.play()
    again = replace(MASKED_ORDER, masking=replace(MASKING, attempt=2).to_json())
    with pytest.raises(Refused, match="this site has given shares for that sum"):
        town.start(BERN).open(again, known=False)


async def test_a_dropped_task_does_not_wait_for_ever(town: Town) -> None:
    import asyncio

    await town.begin()
    bern = town.masks[BERN]
    waiting = asyncio.create_task(bern.mask(MASKED_ORDER, town.folders[BERN], [], 1.0))
    await asyncio.sleep(0)
    bern.drop(ORDER.task)
    with pytest.raises(TaskFailed, match="session was ended"):
        await waiting


@pytest.mark.parametrize(
    ("order", "error", "reason"),
    [
        (replace(ORDER, masking="{"), MalformedMessage, "masking: "),
        (
            replace(ORDER, masking=replace(MASKING, cohort=(*SITES, SiteId("sybil"))).to_json()),
            Untrusted,
            "sybil is not on the roster",
        ),
        (
            replace(ORDER, masking=replace(MASKING, cohort=SITES[:2]).to_json()),
            FedmlError,
            "a sum hides nobody below 3",
        ),
    ],
    ids=["malformed", "sybil", "two"],
)
def test_an_order_that_may_not_be_masked_so_is_refused(
    town: Town, order: Assignment, error: type[FedmlError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        town.masks[BERN].open(order, known=False)


@pytest.mark.parametrize("field", ["model", "training", "privacy", "settings", "round"])
async def test_a_site_that_is_told_another_round_s_terms_stays_alone(
    town: Town, field: str
) -> None:
    """Whatever a coordinator says differently to one site, the others refuse that site's keys."""
    other = {
        "model": replace(ORDER.model, digest="ab" * 32),
        "training": replace(ORDER.training, lr=7.0),
        "privacy": replace(ORDER.privacy, clip=9.0),
        "settings": {"mu": 1.0},
        "round": 2,
    }[field]
    lied = replace(MASKED_ORDER, **{field: other})  # type: ignore[arg-type]
    town.masks[BERN].open(lied, known=False)
    await town.masks[BERN].advertise(lied)
    event = town.said[BERN][-1]
    assert isinstance(event, SecaggSaid)
    with pytest.raises(Untrusted, match="its message is for another run, round, attempt"):
        town.coordinator.take(veil.said(BERN, event).message)


def test_a_message_in_another_s_name_is_refused(town: Town) -> None:
    async def advert() -> SecaggSaid:
        await town.begin()
        event = town.said[BERN][-1]
        assert isinstance(event, SecaggSaid)
        return event

    import asyncio

    event = asyncio.run(advert())
    with pytest.raises(MalformedMessage, match="it is in the name of bern"):
        veil.said(SITES[1], event)


def test_a_site_without_a_roster_masks_nothing(tmp_path: Path) -> None:
    async def tell(event: SiteEvent) -> None:
        raise AssertionError(event)

    bare = Masks(tmp_path, BERN, Demands(), tell)
    assert bare.roster == ""
    with pytest.raises(Untrusted, match="this site has accepted no roster"):
        bare.open(MASKED_ORDER, known=False)


def test_a_roster_without_this_site_s_own_key_is_not_accepted(town: Town, tmp_path: Path) -> None:
    before = masks.accepted(town.folders[BERN])
    for text, reason in (
        (json.dumps({"bern": "ab" * 32}), "bern is not on it with this site's key"),
        ("[]", "no roster; it has the form"),
        (json.dumps({"bern": "xy"}), "no roster; it has the form"),
        (json.dumps({"bern": "ab"}), "identity key of bern: 1 bytes, expected 32"),
    ):
        with pytest.raises(ConfigError, match=reason):
            masks.accept(town.folders[BERN], BERN, text.encode(), "roster.json")
    assert masks.accepted(town.folders[BERN]) == before


def test_a_damaged_identity_is_told(tmp_path: Path) -> None:
    masks.identity(tmp_path)
    path = tmp_path / "secagg" / "identity"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"short")
    with pytest.raises(Corrupt, match="restore it from a backup"):
        masks.identity(tmp_path)


def test_a_policy_that_requires_masks_refuses_the_clear(tmp_path: Path) -> None:
    strict = replace(policy(tmp_path), secagg="required")
    with pytest.raises(Refused, match="policy secagg = 'required': the task's answer would not"):
        decide(strict, ORDER, (RECIPE,))
    assert decide(strict, MASKED_ORDER, (RECIPE,)).part == "train"


@pytest.mark.parametrize(("dataset", "weight"), [("records", 100.0), ("open", 31.0)])
async def test_under_privacy_what_an_update_counts_is_public(
    tmp_path: Path, dataset: str, weight: float
) -> None:
    """A worker's own number would tell a row by its weight in the sum."""
    privacy = ORDER.privacy if dataset == "records" else Privacy()
    order = replace(MASKED_ORDER, dataset=dataset, privacy=privacy)
    worked(tmp_path, order)
    memory, rules, weights = Memory(tmp_path), policy(tmp_path), list[float]()
    durable.replace(
        memory.desk(order.task).outcome, durable.dump_json({"weight": 31.0, "metrics": {}})
    )

    async def mask(order: Assignment, desk: Desk, weight: float) -> None:
        weights.append(weight)

    with open_ledgers(tmp_path, rules) as ledgers:
        door, permit = Door(ledgers, memory), decide(rules, order, (RECIPE,))
        await door.release(order, permit, await door.admit(order, permit), mask)
    assert weights == [weight]
