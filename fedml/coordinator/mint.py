"""The mint: makes a run's candidate into one registered version, whatever crash intervenes."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import shutil
from pathlib import Path

from fedml import durable, failpoints
from fedml.coordinator import press
from fedml.coordinator.archive import Archive
from fedml.coordinator.journal import Journal, Registered
from fedml.errors import Untrusted
from fedml.params import encode
from fedml.protocol.operations import Receipt
from fedml.records import flatten, to_record
from fedml.releases.card import card
from fedml.releases.manifest import Lineage, Manifest, code_digest, open_bundle
from fedml.releases.registry import Registry, Story
from fedml.rounds.hosting import Candidate
from fedml.rounds.run import Run


class Mint:
    """Bundles are made in `folder`, one after another, staged, and noted in the journal."""

    def __init__(self, folder: Path, archive: Archive, journal: Journal) -> None:
        self._folder, self._archive, self._journal = folder, archive, journal
        self._one_version = asyncio.Lock()

    async def register(self, run: Run, candidate: Candidate) -> int:
        """Make a bundle of the candidate, stage it and note it: once, whatever crash intervenes."""
        work, id = self._folder / run.id, run.id
        async with self._one_version:  # or two runs of one model would take the same number
            if not await self._archive.do(lambda registry: _fits(work / "bundle", registry)):
                await self._press(run, candidate, work)
            failpoints.reach("version.pressed")
            story = Story(candidate.receipts, flatten(to_record(run.plan)))
            staged = await self._archive.do(lambda r: r.stage(work / "bundle", story))
        failpoints.reach("version.staged")
        await asyncio.to_thread(self._journal.append, Registered(id, staged.version))
        failpoints.reach("version.noted")
        await asyncio.to_thread(shutil.rmtree, work, True)  # last: a crash before stages it again
        return staged.version

    async def _press(self, run: Run, candidate: Candidate, work: Path) -> None:
        shutil.rmtree(work, ignore_errors=True)
        version = await self._archive.do(lambda r: r.next_version(run.plan.model))
        weights = work / "weights.safetensors"
        durable.replace(weights, *encode({"": candidate.params}))
        facts = self._facts(run, candidate, version)
        draft = work / f"draft-{secrets.token_hex(4)}"  # another press may not be quite dead
        name, spent = f"{facts.model}/{version}", facts.lineage.epsilon
        plan, rounds = run.plan, facts.lineage.rounds
        text = card(name, plan.privacy, rounds, spent, plan.secagg, plan.cohort.quorum)
        await press.bundle(run.plan.recipe, weights, facts, text, draft)
        draft.rename(work / "bundle")

    def _facts(self, run: Run, candidate: Candidate, version: int) -> Manifest:
        plan, receipts = run.plan, candidate.receipts
        spent: dict[str, float] = {}
        for receipt in receipts:
            for counted in receipt.counted:
                spent[counted.site] = max(spent.get(counted.site, 0.0), counted.epsilon)
        told = self._journal.runs[run.id].data
        data = {site: digest for site, digest in told.items() if site in spent}
        lineage = Lineage(
            run=run.id,
            recipe=plan.recipe,
            rounds=run.done,
            parent=plan.parent,
            receipts=tuple(digest_of(receipt) for receipt in receipts),
            plan=plan.digest(),
            code=code_digest(),
            data=data,
            epsilon=spent,
            delta=plan.privacy.delta,
        )
        created = receipts[-1].closed  # not now: the same after a crash
        return Manifest(plan.model, version, created, lineage, scores=candidate.scores)


def _fits(bundle: Path, registry: Registry) -> bool:
    """True if a bundle that a crash left behind is whole, and its number is its own or free."""
    try:
        manifest = open_bundle(bundle)
    except Untrusted:
        return False
    if manifest.version == registry.next_version(manifest.model):
        return True
    rows = registry.list(manifest.model)
    return any((r.version, r.digest) == (manifest.version, manifest.digest) for r in rows)


def digest_of(receipt: Receipt) -> str:
    """SHA-256 of a receipt's canonical JSON, in hex."""
    return hashlib.sha256(durable.dump_json(to_record(receipt))).hexdigest()
