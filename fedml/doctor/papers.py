"""The doctor looks at keys and certificates: do they fit, how long do they last, who reads them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from fedml import durable
from fedml.doctor.finding import DAY, Finding, attempt, days
from fedml.errors import Corrupt
from fedml.identity.certificates import SKEW, Authority, Credentials, fingerprint, identity_of
from fedml.identity.receipts import Sealer
from fedml.releases.signing import TIMESTAMP

_ROOT_NOTICE = 90 * DAY  # an authority's end concerns everybody: speak up early
_PUBLIC = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def credentials(papers: Credentials, now: float, *, renewal: str) -> list[Finding]:
    """Look at a site's or an operator's certificate; `renewal` says how it gets a new one."""
    return [
        *attempt("certificate", lambda: _certificate(papers, now, renewal)),
        *attempt("key", lambda: _key(papers)),
        *attempt("authority", lambda: _root(papers.ca, now)),
    ]


def _certificate(papers: Credentials, now: float, renewal: str) -> Finding:
    identity = identity_of(papers.certificate, now)
    leaf, root = _read(papers.certificate), _read(papers.ca)
    try:
        leaf.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return Finding(
            "fail",
            "certificate",
            f"{identity} has one from another authority than it trusts",
            "restore identity.json whole, or join again with a new token",
        )
    left, life = identity.expires - now, identity.expires - identity.issued
    found = f"{identity}, serial {identity.serial:x}, expires in {days(left)}"
    if left < life * 0.3:  # it is renewed once a third is left
        return Finding("warn", "certificate", found, renewal)
    return Finding("ok", "certificate", found)


def _key(papers: Credentials) -> Finding:
    try:
        key = serialization.load_pem_private_key(papers.key, None)
    except (ValueError, TypeError) as error:
        raise Corrupt("the private key does not read; join again with a new token") from error
    if key.public_key().public_bytes(*_PUBLIC) != _key_in(papers.certificate):
        return Finding(
            "fail",
            "key",
            "is not the one that the certificate is for",
            "restore identity.json whole, or join again with a new token",
        )
    return Finding("ok", "key", "fits the certificate")


def _root(certificate: bytes, now: float) -> Finding:
    """Look at an authority; people compare its fingerprint by telephone."""
    root = _read(certificate)
    found = _lifetime(
        "authority",
        root.not_valid_before_utc,
        root.not_valid_after_utc,
        now,
        notice=_ROOT_NOTICE,
        advice="all sites will have to join anew under a new authority; plan it together",
    )
    return replace(found, found=f"SHA-256 {fingerprint(certificate)}, {found.found}")


def authority(folder: Path, now: float) -> list[Finding]:
    """Look at a coordinator's own authority, and at the key that seals its receipts."""

    def root() -> Iterable[Finding]:
        ours = Authority.load(folder)
        pair = durable.read_json(folder / "ca.json")
        key = serialization.load_pem_private_key(str(pair["key"]).encode(), None)
        if key.public_key().public_bytes(*_PUBLIC) != _key_in(ours.certificate):
            advice = "restore ca/ca.json from a backup"
            return [Finding("fail", "authority", "its key does not fit its certificate", advice)]
        return [_root(ours.certificate, now)]

    def sealer() -> Finding:
        path = folder / "receipts.json"
        if not path.exists():
            return Finding("ok", "receipts", "no key yet; it is made at the first start")
        seal = _read(Sealer.open(path, Authority.load(folder)).certificate.encode())
        return _lifetime(
            "receipts",
            seal.not_valid_before_utc,
            seal.not_valid_after_utc,
            now,
            notice=_ROOT_NOTICE,
            advice="move ca/receipts.json away and restart: a new key is made",
        )

    return [*attempt("authority", root), *attempt("receipts", sealer)]


def releases(folder: Path, now: float, *, running: bool, mirrored: bool) -> list[Finding]:
    """Look at how long sites will take the release metadata as they are.

    Those `mirrored` are another's, who may have released nothing yet.
    """
    upkeep = (
        f"{'they are fetched' if mirrored else 'the coordinator renews them'} hourly; see its log "
        "for why it did not"
        if running
        else f"start the coordinator, which {'fetches' if mirrored else 'renews'} them"
    )

    def expiry(path: Path) -> Finding:
        raw = durable.read_json(path)
        try:
            begin, end = (
                datetime.fromisoformat(text) for text in (_EPOCH, raw["signed"]["expires"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"{path} is damaged ({error}); restore it from a backup") from error
        notice = 2 * DAY if path.name == TIMESTAMP else 30 * DAY
        name = path.name.removesuffix(".json").rpartition(".")[2]
        return _lifetime(f"release {name}", begin, end, now, notice=notice, advice=upkeep)

    timestamp = folder / "metadata" / TIMESTAMP
    roots = (folder / "metadata").glob("*.root.json")
    paths = sorted(roots, key=lambda path: int(path.name.partition(".")[0]))[-1:]
    if mirrored and not timestamp.exists():
        return [Finding("ok", "releases", "none of the parent's was fetched yet")]
    paths.insert(0, timestamp)
    return [f for path in paths for f in attempt("releases", lambda path=path: expiry(path))]  # type: ignore[misc]


_EPOCH = "1970-01-01T00:00:00+00:00"


def private(*paths: Path) -> list[Finding]:
    """Look at who may read files that only their owner should."""
    findings = []
    for path in paths:
        findings += attempt("modes", lambda path=path: _mode(path))  # type: ignore[misc]
    bad = [finding for finding in findings if finding.state != "ok"]
    return bad or [
        Finding("ok", "modes", f"{len(findings)} secret files, only their owner reads them")
    ]


def _mode(path: Path) -> Finding:
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o077:
        return Finding(
            "fail", "modes", f"{path} has mode {mode:o}: others may read it", f"chmod 600 {path}"
        )
    if found.st_uid != os.geteuid() != 0:
        return Finding(
            "warn", "modes", f"{path} belongs to user {found.st_uid}", "run as that user"
        )
    return Finding("ok", "modes", str(path))


def _lifetime(
    what: str, begin: datetime, end: datetime, now: float, *, notice: float, advice: str
) -> Finding:
    left = end.timestamp() - now
    if left <= 0:
        return Finding("fail", what, f"expired {days(-left)} ago", advice)
    if now < begin.timestamp() - SKEW:
        return Finding("fail", what, f"begins in {days(begin.timestamp() - now)}", "set the clock")
    found = f"expires in {days(left)}"
    return Finding("warn", what, found, advice) if left < notice else Finding("ok", what, found)


def _read(certificate: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(certificate)
    except ValueError as error:
        raise Corrupt(
            f"a certificate does not read ({error}); restore it, or join again"
        ) from error


def _key_in(certificate: bytes) -> bytes:
    return _read(certificate).public_key().public_bytes(*_PUBLIC)
