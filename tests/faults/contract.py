"""What must hold after any faults: docs/faults.md, as far as files and answers can show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from fedml import durable, failpoints
from fedml.protocol.messages import RunId
from fedml.protocol.operations import Receipt, RunDetail
from fedml.rounds import Plan
from fedml.strategies import buffering_of
from tests.faults.fleet import PATIENCE, Fleet
from tests.faults.oracle import check_each_step, models, undisturbed

if TYPE_CHECKING:
    from tests.faults.schedule import Tally


@dataclass(frozen=True)
class Kept:
    """What was on the coordinator's disk when a program had just died."""

    run: RunId
    rounds: tuple[Mapping[str, Any], ...]


def keep(fleet: Fleet, run: RunId) -> Kept:
    """Note which rounds of a run are committed."""
    return Kept(run, tuple(r["entry"] for r in fleet.journal(run) if r["kind"] == "RoundCommitted"))


def uphold(fleet: Fleet, run: RunId, plan: Plan, kept: Sequence[Kept], tally: Tally) -> None:
    """Raise `AssertionError` unless the run, which has ended, and all that is left are right."""
    detail = fleet.ended(run)
    receipts = detail.receipts
    _it_ended_as_planned(fleet, detail, plan)
    _no_committed_round_is_lost(detail, [each for each in kept if each.run == run])
    for receipt in receipts:
        _the_receipt_is_right(receipt)
    if plan.privacy.mode == "none":
        _it_came_to_the_same_bytes(fleet, receipts, plan)
    assert [number for number, _ in models(receipts)] == list(range(1, plan.rounds + 1))
    for site in fleet.sites:
        _nothing_is_left_at_the_site(fleet, site, run)
        _each_answer_was_charged_once(fleet, site, receipts, private=plan.privacy.mode != "none")
    _nobody_is_left_behind(fleet)
    _nobody_met_a_bug(fleet)
    tally.asked_again += sum(receipt.attempt > 1 for receipt in receipts)


def _it_ended_as_planned(fleet: Fleet, detail: RunDetail, plan: Plan) -> None:
    info = detail.info
    if plan.gates:
        assert (info.state, info.version) == ("failed", 0), info
        assert info.detail.startswith("no candidate: gate accuracy: "), info
        return
    assert info.state == "done", info
    versions = fleet.ask(lambda c: c.list_models())
    mine = [version for version in versions if version.run == info.id]
    assert [(v.version, v.state) for v in mine] == [(info.version, "candidate")], mine
    assert len({v.version for v in versions if v.model == plan.model}) == sum(
        v.model == plan.model for v in versions
    )


def _no_committed_round_is_lost(detail: RunDetail, kept: Sequence[Kept]) -> None:
    now = [(r.kind, r.round, r.attempt, r.model) for r in detail.receipts]
    for each in kept:
        told = [entry["receipt"] for entry in each.rounds]
        before = [(r["kind"], r["round"], r["attempt"], r["model"]) for r in told]
        assert now[: len(before)] == before, f"{before} was committed, and now there is {now}"


def _the_receipt_is_right(receipt: Receipt) -> None:
    counted = [one.site for one in receipt.counted]
    assert len(set(counted)) == len(counted), f"counted twice: {receipt}"
    assert sorted([*counted, *receipt.missing, *receipt.carried]) == sorted(receipt.asked), receipt
    assert all(receipt.missing.values()), receipt
    digests = [one.digest for one in receipt.counted if receipt.kind == "train"]
    still = receipt.metrics.get("loss") == 0  # a model that fits all rows moves at no site
    assert all(digests) and (still or len(set(digests)) == len(digests)), receipt


def _it_came_to_the_same_bytes(fleet: Fleet, receipts: Sequence[Receipt], plan: Plan) -> None:
    """Each round's model, and who counted with what, is that of a run without any fault."""
    folders = tuple(fleet.site(site) for site in fleet.sites)
    if buffering_of(plan.strategy):
        check_each_step(plan, receipts, folders)
        return
    told, now = undisturbed(plan.to_json(), folders), [r for r in receipts if r.counted and r.model]
    for ours, theirs in zip(now, told, strict=True):
        assert (ours.kind, ours.round, ours.model) == (theirs.kind, theirs.round, theirs.model), (
            ours,
            theirs,
        )
        assert ours.counted == theirs.counted, (ours, theirs)
        assert ours.scores == theirs.scores, (ours, theirs)


def _nothing_is_left_at_the_site(fleet: Fleet, site: str, run: RunId) -> None:
    """Orders, results, blobs and reservations of the run are gone; only charges stay."""
    folder = fleet.site(site)

    def left() -> list[str]:
        names = [path.name for path in (folder / "tasks").iterdir()]
        names = [name for name in names if name.startswith(f"{run}.")]
        names += [e.task for e in fleet.ledger(site) if e.run == run and e.state == "reserved"]
        return names

    assert fleet.until(lambda: not left(), PATIENCE), f"{site} still has {left()}"


def _each_answer_was_charged_once(
    fleet: Fleet, site: str, receipts: Sequence[Receipt], *, private: bool
) -> None:
    """The charges are those of the answers that counted, each once.

    More only for an attempt that failed or went on without the site: it may have answered, and
    its answer came too late. Such an attempt has its receipt.
    """
    run = receipts[0].run
    path = fleet.site(site) / "ledger" / "rows.jsonl"
    log = [r for r in durable.read_log(path) if r.get("run") == run] if path.exists() else []
    charges = Counter(r["task"] for r in log if r["kind"] == "charged")
    if not private:
        assert not log, log
        return
    assert all(count == 1 for count in charges.values()), charges
    wanted, allowed = set(), set()
    for receipt in receipts:
        kind = "" if receipt.kind == "train" else "e"
        task = f"{run}.{receipt.round}.{kind}{receipt.attempt}.{site}"
        if any(one.site == site for one in receipt.counted):
            wanted.add(task)
        elif site in receipt.asked:
            allowed.add(task)
    assert wanted <= charges.keys(), f"{site} counted and never paid: {wanted - charges.keys()}"
    assert charges.keys() <= wanted | allowed, f"{site} paid for {charges.keys() - wanted}"


def _nobody_is_left_behind(fleet: Fleet) -> None:
    """Of the fleet's processes there are its programs and one worker a site; none is a zombie."""

    def strangers() -> list[str]:
        ours = {fleet.pid(name) for name in fleet.programs}
        workers = {w.pid for site in fleet.sites if (w := fleet.worker(site))}
        found = []
        for process in psutil.process_iter():
            try:
                mine = str(fleet.folder) in process.environ().get(failpoints.VARIABLE, "")
                if process.ppid() in ours | workers and process.status() == psutil.STATUS_ZOMBIE:
                    found.append(f"zombie {process.pid}")
                elif mine and process.pid not in ours | workers:
                    found.append(f"{process.pid}: {' '.join(process.cmdline())}")
            except psutil.Error:
                continue
        return found

    assert fleet.until(lambda: not strangers(), PATIENCE), strangers()


def _nobody_met_a_bug(fleet: Fleet) -> None:
    for name in fleet.programs:
        said = fleet.news(name)
        for sign in ("Traceback", "a bug", "stands still", '"exception"'):
            assert sign not in said, f"{name}: {next(x for x in said.splitlines() if sign in x)}"
