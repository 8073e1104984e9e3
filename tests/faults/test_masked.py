"""Masked rounds among real programs over mutual TLS: the sum is the plain one, whoever is killed,
and the coordinator's memory and log hold no site's update."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedml import durable
from fedml.learning.trainer import Trainer
from fedml.params import Params, read
from fedml.protocol.messages import RunId, SiteId
from fedml.protocol.operations import Receipt, RunDetail
from fedml.protocol.secagg import Secagg
from fedml.protocol.tasks import Brief, Task, Update
from fedml.rounds import Cohort, Evaluation, Opening, Plan, terms_of, vectors
from fedml.secagg import Roster
from fedml.site import masks
from fedml.strategies import FedBuff
from tests.faults import fleet as fleets
from tests.faults.fleet import COORDINATOR, PATIENCE, RECIPES, Fleet, first_params
from tests.secagg.worlds import plain_words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SITES = ("bern", "kyoto", "oslo", "quito")
VICTIM = "kyoto"
SA1 = Secagg("sa1", clip=0.5, weight_cap=100.0, scores=("accuracy",), patience=30.0)
_NEEDLE = 64  # bytes
_CURIOUS = """
import sys
if "coordinator" in sys.orig_argv:
    import numpy
    from fedml.coordinator import veil
    kept, honest = [], veil.masked
    def masked(*arguments):
        said = honest(*arguments)
        kept.append(numpy.array(said.words))
        return said
    veil.masked = masked
"""
_BARE = """
import sys
if "site" in sys.orig_argv:
    from fedml.secagg import Site
    Site._masks = lambda site: []
"""


class Veiled(Fleet):
    """Four sites whose operators have accepted the roster of the four."""

    def make(self, addresses: dict[str, str] | None = None) -> None:  # type: ignore[override]
        super().make(addresses or {})
        keys = {name: masks.identity(self.site(name)).public_key() for name in self.sites}
        text = durable.dump_json({n: key.public_bytes_raw().hex() for n, key in keys.items()})
        for name in self.sites:
            masks.accept(self.site(name), SiteId(name), text, "roster.json")
        durable.replace(self.hub / "roster.json", text)

    def code(self, name: str, text: str) -> None:
        """Have a program run `text` before anything else, from its next start on."""
        folder = self.folder / "first" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sitecustomize.py").write_text(text)
        self.first[name] = folder

    def params(self, run: RunId, rounds: int) -> Params:
        return read(self.hub / "states" / f"{run}.{rounds}.safetensors")[""]

    @property
    def roster(self) -> Roster:
        return Roster.parse((self.hub / "roster.json").read_bytes(), "roster.json")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Veiled]:
    a_fleet = Veiled(tmp_path_factory.mktemp("veiled"), SITES, heartbeat=1.0, grace=4.0)
    with a_fleet:
        a_fleet.found()
        yield a_fleet


def plan(seed: int, *, masked: bool = True, quorum: int = 3, recipe: str = "small") -> Plan:
    base = fleets.plan(seed, recipe=recipe, rounds=2)
    cohort = Cohort(quorum=quorum, deadline=60.0, sites=tuple(map(SiteId, SITES)))
    return replace(base, cohort=cohort, secagg=SA1 if masked else Secagg())


def scores(detail: RunDetail) -> float:
    return next(r.scores["accuracy"] for r in detail.receipts if r.scores)


def test_a_masked_run_comes_to_the_plain_one_s_model_and_scores(fleet: Veiled) -> None:
    plans = [plan(1, masked=masked, quorum=4) for masked in (False, True)]
    plans[1] = replace(plans[1], gates=())  # it becomes a version
    clear, veiled = (fleet.submit(each) for each in plans)  # all count, or a round is tried again
    one, other = fleet.finish(clear), fleet.finish(veiled)
    assert [r.round for r in other.receipts if r.kind == "train" and r.model] == [1, 2]
    assert {c.weight for r in other.receipts for c in r.counted} == {0.0}
    assert scores(other) == pytest.approx(scores(one))
    moved = fleet.params(clear, 2)
    for name, tensor in fleet.params(veiled, 2).items():
        assert (tensor.double() - moved[name].double()).abs().max() < 1e-7  # float32 of about 1
    assert not any(moved[n].equal(t) for n, t in first_params(plan(1)).items())
    [card] = fleet.hub.rglob("privacy.txt")
    assert "masked (sa1)" in card.read_text() and "with at least 4 sites" in card.read_text()


@pytest.mark.parametrize(
    ("point", "counted"),
    [("worker.trained", 3), ("work.charged", 3), ("update.announced", 4)],
    ids=["while it trains", "before its upload", "before it unmasks"],
)
def test_a_site_that_is_killed_costs_the_round_nothing(
    fleet: Veiled, point: str, counted: int
) -> None:
    """With three of four needed, one may go at any time; its vector counts if it had come."""
    fleet.arm(VICTIM, f"{point}:1:{'hang' if point == 'worker.trained' else 'kill'}")
    run = fleet.submit(plan(2))
    if point == "worker.trained":
        assert fleet.until(lambda: not fleet.is_armed(VICTIM), PATIENCE)
        fleet.slay(VICTIM)
    fleet.bury(VICTIM)
    fleet.launch(VICTIM)
    detail = fleet.finish(run)
    first = detail.receipts[0]
    assert first.model, first.missing
    assert len(first.counted) == counted
    assert (VICTIM in first.missing) == (counted == 3)
    assert sum(1 for r in detail.receipts if r.kind == "train" and r.model) == 2
    fleet.until_all_are_here()


def test_a_coordinator_that_is_killed_in_a_masked_round_tries_it_again(fleet: Veiled) -> None:
    fleet.arm(COORDINATOR, "update.read:2:kill")
    run = fleet.submit(plan(3))
    fleet.bury(COORDINATOR)
    fleet.launch(COORDINATOR)
    detail = fleet.finish(run)
    trained = [r for r in detail.receipts if r.kind == "train"]
    assert [(r.round, r.attempt, bool(r.model)) for r in trained][:2] == [
        (1, 1, False),
        (1, 2, True),
    ]
    assert "a masked sum was lost" in next(iter(trained[0].missing.values()))


def test_a_site_whose_policy_requires_masks_refuses_the_clear(fleet: Veiled) -> None:
    path = fleet.site("oslo") / "policy.toml"
    before = path.read_text()
    path.write_text('secagg = "required"\n' + before)
    fleet.relaunch("oslo")
    fleet.until_all_are_here()
    clear = fleet.finish(fleet.submit(plan(4, masked=False)))
    assert "policy secagg = 'required'" in clear.receipts[0].missing["oslo"]
    assert not fleet.finish(fleet.submit(plan(4))).receipts[0].missing
    path.write_text(before)
    fleet.relaunch("oslo")
    fleet.until_all_are_here()


def test_a_site_with_another_roster_is_not_asked(fleet: Veiled) -> None:
    path = fleet.site("quito") / "secagg" / "roster.json"
    before = path.read_bytes()
    three = {name: key for name, key in json.loads(before).items() if name != "bern"}
    masks.accept(fleet.site("quito"), SiteId("quito"), durable.dump_json(three), "three")
    fleet.relaunch("quito")
    fleet.until_all_are_here()
    receipt = fleet.finish(fleet.submit(plan(5))).receipts[0]
    assert receipt.left_out["quito"] == "has not accepted this roster of sites that mask"
    assert len(receipt.counted) == 3
    path.write_bytes(before)
    fleet.relaunch("quito")
    fleet.until_all_are_here()


# --- buffers: a round closes with the first three vectors of four ------------------------------


def buffered(seed: int, rounds: int = 2) -> Plan:
    """Whose rounds may last for as long as any test."""
    base = plan(seed)
    cohort = replace(base.cohort, deadline=300.0)
    return replace(base, strategy=FedBuff(max_staleness=0), cohort=cohort, rounds=rounds)


def trained(detail: RunDetail) -> list[Receipt]:
    return [receipt for receipt in detail.receipts if receipt.kind == "train"]


def hang(fleet: Veiled, a_plan: Plan) -> RunId:
    """Submit a run whose first task hangs at the victim for ever, and wait until it does."""
    fleet.arm(VICTIM, "worker.begun:1:hang")
    run = fleet.submit(a_plan)
    assert fleet.until(lambda: not fleet.is_armed(VICTIM), PATIENCE)
    return run


def test_nobody_waits_for_a_slow_site_and_the_sum_is_of_the_others(fleet: Veiled) -> None:
    a_plan = replace(buffered(7, rounds=1), evaluation=Evaluation(at_end=False), gates=())
    run = hang(fleet, a_plan)
    [receipt] = fleet.finish(run).receipts
    assert receipt.missing == {VICTIM: "not waited for: enough masked vectors came"}
    assert {one.site for one in receipt.counted} == {*SITES} - {VICTIM}
    assert fleet.until(lambda: receipt.missing[VICTIM] in fleet.log(VICTIM), PATIENCE)
    opening = first_opening(run, a_plan)
    updates = [first_update(fleet, a_plan, opening, one.site) for one in receipt.counted]
    whole = sum(update.weight for update in updates)
    found = fleet.params(run, 1)
    for name, start in first_params(a_plan).items():
        step = sum(u.delta[name].double() * (u.weight / whole) for u in updates)
        assert (found[name].double() - start.double() - step).abs().max() < 1e-7


def test_who_was_called_back_has_a_part_in_the_next_rounds(fleet: Veiled) -> None:
    """One of the others hangs in the second round, so that the first one is needed there."""
    fleet.arm(COORDINATOR, "round.committed:1:delay=1.5")
    run = hang(fleet, buffered(8))
    assert fleet.until(lambda: not fleet.is_armed(COORDINATOR), PATIENCE)
    fleet.arm("quito", "worker.begun:1:hang")
    first, second = trained(fleet.finish(run))
    assert first.missing == {VICTIM: "not waited for: enough masked vectors came"}
    assert second.missing == {"quito": "not waited for: enough masked vectors came"}
    assert {one.site for one in second.counted} == {*SITES} - {"quito"}


def test_a_slow_site_that_is_killed_costs_a_buffer_nothing(fleet: Veiled) -> None:
    for name in SITES:
        if name != VICTIM:
            fleet.arm(name, "worker.trained:1:delay=1")
    run = hang(fleet, buffered(9))
    fleet.slay(VICTIM)
    fleet.bury(VICTIM)
    fleet.launch(VICTIM)
    receipts = trained(fleet.finish(run))
    assert [(r.round, r.attempt, bool(r.model)) for r in receipts] == [(1, 1, True), (2, 1, True)]
    assert [one.site for one in receipts[0].counted] == [s for s in SITES if s != VICTIM]
    assert all(len(receipt.counted) == 3 for receipt in receipts)
    fleet.until_all_are_here()


@pytest.mark.parametrize(
    ("strike", "tries"),
    [
        ("update.read:3:kill", [(1, 1, False), (1, 2, True), (2, 1, True)]),
        ("round.committed:1:kill", [(1, 1, True), (2, 1, False), (2, 2, True)]),
    ],
    ids=["when enough came", "before the slow one knows"],
)
def test_a_coordinator_that_is_killed_goes_on_with_buffers(
    fleet: Veiled, strike: str, tries: list[tuple[int, int, bool]]
) -> None:
    fleet.arm(COORDINATOR, strike)
    run = hang(fleet, buffered(10))
    fleet.bury(COORDINATOR)
    fleet.launch(COORDINATOR)
    detail = fleet.finish(run)
    receipts = trained(detail)
    assert [(r.round, r.attempt, bool(r.model)) for r in receipts] == tries
    assert [len(r.counted) for r in receipts if r.model] == [3, 3]
    lost = next(r for r in receipts if not r.model)
    assert {*lost.missing.values()} == {"the coordinator was restarted, and a masked sum was lost"}
    assert 0 <= scores(detail) <= 1


def test_a_site_knows_of_how_few_a_masked_buffer_is(fleet: Veiled) -> None:
    path = fleet.site("oslo") / "policy.toml"
    before = path.read_text()
    path.write_text(before.replace("minimum_cohort = 2", "minimum_cohort = 4"))
    fleet.relaunch("oslo")
    fleet.until_all_are_here()
    receipt = fleet.finish(fleet.submit(buffered(11))).receipts[0]
    assert receipt.missing["oslo"].startswith("policy minimum_cohort = 4: this round")
    assert len(receipt.counted) == 3
    path.write_text(before)
    fleet.relaunch("oslo")
    fleet.until_all_are_here()


# --- what is in the coordinator ----------------------------------------------------------------


def first_update(fleet: Veiled, a_plan: Plan, opening: Opening, site: SiteId) -> Update:
    """Return what a site made of the first model: it is trained again."""
    brief = Brief(first_params(a_plan))
    task = Task(opening.task_id(site), opening.run, 1, site, "train", brief)
    recipe = RECIPES[a_plan.recipe.name]
    rows = recipe.read(fleet.site(site) / "train.csv")
    torch.set_num_threads(1)
    trainer = Trainer(recipe, a_plan.training, a_plan.privacy)
    update, _ = trainer.train(task, rows, {}, seed=a_plan.task_seed(1, site))
    return update


def first_opening(run: RunId, a_plan: Plan) -> Opening:
    cohort = tuple(map(SiteId, SITES))
    return Opening(run, 1, 1, cohort, a_plan.cohort.quorum, a_plan.cohort.deadline)


def needles(fleet: Veiled, run: RunId, a_plan: Plan) -> dict[str, bytes]:
    """Return pieces of the victim's first update, as floats and as words."""
    brief, opening = Brief(first_params(a_plan)), first_opening(run, a_plan)
    update = first_update(fleet, a_plan, opening, SiteId(VICTIM))
    values = vectors.numbers_of(update, brief, SA1)
    terms = terms_of(opening, brief, SA1, fleet.roster)
    words = plain_words(values, update.weight / SA1.weight_cap, terms)
    [floats] = [array for name, array in values.items() if name.startswith("delta")]
    found: dict[str, bytes] = {}
    for what, array in (("numbers", floats), ("words", words)):
        moved = [s for s in range(0, 500_000, 50_000) if floats[s : s + 16].all()]
        assert moved
        found |= {f"{what} at {start}": array[start:].tobytes()[:_NEEDLE] for start in moved}
    return found


def memory(pid: int) -> Iterator[bytes]:
    """Yield what is in each writable stretch of a process's memory."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for span in filter(None, (re.match(r"(\w+)-(\w+) rw", line) for line in maps)):
            start, end = (int(place, 16) for place in span.groups())
            try:
                mem.seek(start)
                yield mem.read(end - start)
            except OSError:
                continue  # the kernel's own


def log_of(fleet: Veiled) -> bytes:
    return Path(fleet.folder / "logs" / f"{COORDINATOR}.log").read_bytes()


@pytest.mark.parametrize("leaking", [False, True], ids=["masked", "mutated"])
def test_the_coordinator_s_memory_and_log_hold_no_site_s_update(
    fleet: Veiled, leaking: bool
) -> None:
    """The coordinator is a curious one, which keeps the words of all that it is sent."""
    fleet.code(COORDINATOR, _CURIOUS)
    fleet.code(VICTIM, _BARE if leaking else "")
    fleet.relaunch(COORDINATOR)
    fleet.relaunch(VICTIM)
    fleet.until_all_are_here()
    a_plan = replace(plan(6, recipe="light"), rounds=1, attempts=1)
    run = fleet.submit(a_plan)
    detail = fleet.finish(run)
    assert leaking or detail.receipts[0].model
    wanted = needles(fleet, run, a_plan)
    found = {n for region in memory(fleet.pid(COORDINATOR)) for n in wanted if wanted[n] in region}
    fleet.first.clear()
    if leaking:
        assert any(name.startswith("words") for name in found)
        return
    assert found == set()
    log = log_of(fleet)
    assert not any(raw in log or raw.hex().encode() in log for raw in wanted.values())
