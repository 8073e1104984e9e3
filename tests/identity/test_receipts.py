"""Receipts: what was signed verifies with the authority alone, and no change goes unnoticed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedml.errors import Corrupt, Untrusted
from fedml.identity.certificates import Authority, new_key_and_csr
from fedml.identity.receipts import Sealer, start, verify
from fedml.protocol import codec
from fedml.protocol.messages import RunId, SiteId
from fedml.protocol.operations import Counted, Receipt, RunDetail, RunInfo, Seal
from fedml.records import from_record, to_record

RUN = RunId("cancer-1")
BERN, KYOTO = SiteId("bern"), SiteId("kyoto")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", time.time())


@pytest.fixture
def sealer(authority: Authority, tmp_path: Path) -> Sealer:
    return Sealer.open(tmp_path / "ca" / "receipts.json", authority)


@pytest.fixture
def detail(sealer: Sealer) -> RunDetail:
    return chained(sealer, [receipt(number) for number in (1, 2, 3)])


def receipt(number: int) -> Receipt:
    counted = (Counted(BERN, 3.0, "ab" * 32, 0.5), Counted(KYOTO, 1.0 / 3, "cd" * 32, 0.25))
    return Receipt(
        RUN, number, 1, (BERN, KYOTO), counted, {"quito": "crashed"}, {"zug": "not connected"},
        {"loss": 1}, model="ef" * 32, opened=time.time() - 1, closed=time.time(),
    )  # fmt: skip


def chained(sealer: Sealer, receipts: list[Receipt], plan: str = '{"plan":1}') -> RunDetail:
    link, seals = start(RUN, plan), list[Seal]()
    for each in receipts:
        seals.append(sealer.seal(link, each))
        link = seals[-1].link
    info = RunInfo(RUN, "cancer", "done", 3, 3, 1.0)
    return RunDetail(info, plan, tuple(receipts), tuple(seals), sealer.certificate)


def test_what_was_sealed_verifies_after_the_wire_and_after_a_file(
    detail: RunDetail, authority: Authority, sealer: Sealer
) -> None:
    head = verify(detail, authority.certificate)
    assert head == detail.seals[-1].link
    sent = codec.decode(RunDetail, codec.encode(detail))
    assert verify(sent, authority.certificate) == head
    kept = from_record(RunDetail, to_record(detail), "file")
    assert verify(kept, authority.certificate) == head
    assert sealer.seal(detail.seals[1].link, detail.receipts[2]) == detail.seals[2]


@pytest.mark.parametrize(
    "change",
    [
        {"counted": (Counted(BERN, 3.0, "ab" * 32, 0.5),)},
        {"counted": (Counted(BERN, 30.0, "ab" * 32, 0.5), Counted(KYOTO, 1 / 3, "cd" * 32, 0.25))},
        {"counted": (Counted(BERN, 3.0, "00" * 32, 0.5), Counted(KYOTO, 1 / 3, "cd" * 32, 0.25))},
        {"missing": {}},
        {"asked": (BERN,)},
        {"model": "00" * 32},
        {"closed": 1.0},
        {"left_out": {"zug": "refused"}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_receipt_that_was_rewritten_is_found(
    detail: RunDetail, authority: Authority, change: dict[str, object]
) -> None:
    forged = replace(detail.receipts[1], **change)  # type: ignore[arg-type]
    receipts = (detail.receipts[0], forged, detail.receipts[2])
    with pytest.raises(Untrusted, match=r"receipt 2 \(train round 2\) or one before it was chan"):
        verify(replace(detail, receipts=receipts), authority.certificate)


def test_a_rewritten_receipt_with_a_link_made_to_fit_is_not_signed(
    detail: RunDetail, authority: Authority
) -> None:
    mallory = Sealer(Ed25519PrivateKey.generate(), "")
    forged = replace(detail.receipts[2], missing={})
    seals = (*detail.seals[:2], mallory.seal(detail.seals[1].link, forged))
    with pytest.raises(Untrusted, match=r"receipt 3 .* is not signed by the coordinator"):
        verify(
            replace(detail, receipts=(*detail.receipts[:2], forged), seals=seals),
            authority.certificate,
        )


def test_receipts_taken_out_moved_or_of_another_run_are_found(
    detail: RunDetail, authority: Authority, sealer: Sealer
) -> None:
    first, second, third = zip(detail.receipts, detail.seals, strict=True)
    for pairs in ((first, third), (second, first, third), (first, first, second), (second, third)):
        receipts, seals = zip(*pairs, strict=True)
        with pytest.raises(Untrusted, match="changed, added or taken out"):
            verify(replace(detail, receipts=receipts, seals=seals), authority.certificate)
    with pytest.raises(Untrusted, match="3 receipts and 2 seals"):
        verify(replace(detail, seals=detail.seals[:2]), authority.certificate)
    with pytest.raises(Untrusted, match="changed, added or taken out"):  # another plan
        verify(replace(detail, plan="{}"), authority.certificate)
    other = replace(detail.info, id=RunId("cancer-2"))
    with pytest.raises(Untrusted, match="changed, added or taken out"):
        verify(replace(detail, info=other), authority.certificate)


def test_receipts_signed_with_a_site_s_own_certificate_are_refused(
    detail: RunDetail, authority: Authority
) -> None:
    _, csr = new_key_and_csr("mallory")
    certificate = authority.issue(csr, "mallory", "site", time.time())
    mallory = Sealer(Ed25519PrivateKey.generate(), certificate.decode())
    with pytest.raises(Untrusted, match=r"certified for \['spiffe://fedml/site/mallory'\], not"):
        verify(chained(mallory, list(detail.receipts)), authority.certificate)


def test_receipts_signed_under_another_authority_are_refused(
    detail: RunDetail, authority: Authority, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other", time.time())
    forger = Sealer.open(tmp_path / "other" / "receipts.json", other)
    with pytest.raises(Untrusted, match="not certified by this authority"):
        verify(chained(forger, list(detail.receipts)), authority.certificate)
    for certificate in ("", "garbage"):
        with pytest.raises(Untrusted, match="not certified by this authority"):
            verify(replace(detail, sealer=certificate), authority.certificate)


def test_the_sealer_s_key_is_made_once_and_only_its_owner_reads_it(
    sealer: Sealer, authority: Authority, tmp_path: Path
) -> None:
    path = tmp_path / "ca" / "receipts.json"
    assert Sealer.open(path, authority).certificate == sealer.certificate
    assert path.stat().st_mode & 0o077 == 0
    path.write_text("{}")
    with pytest.raises(Corrupt, match="restore it from a backup"):
        Sealer.open(path, authority)
