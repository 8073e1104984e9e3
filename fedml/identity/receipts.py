"""Receipts that nobody can change unnoticed: each is chained to those before it, and signed.

A coordinator's sealer is an Ed25519 key that the consortium's authority has certified for this
and nothing else, so whoever holds the authority's certificate (every site and operator does)
verifies a run's receipts without asking anyone. A chain starts from the run's id and plan.

A link covers a receipt's fields that are not empty, so a field that a later version adds leaves
older seals whole. A chain whose end was cut off is whole too: compare its head with one that was
noted elsewhere.
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedml import durable
from fedml.errors import Corrupt, Untrusted
from fedml.identity.certificates import Authority
from fedml.protocol.messages import RunId
from fedml.protocol.operations import Receipt, RunDetail, Seal
from fedml.records import from_record, to_record

PURPOSE = "spiffe://fedml/receipts/coordinator"


class Sealer:
    """Signs receipts; its key lies in one file that only the coordinator reads."""

    def __init__(self, key: Ed25519PrivateKey, certificate: str) -> None:
        self._key, self.certificate = key, certificate

    @classmethod
    def open(cls, path: Path, authority: Authority) -> Sealer:
        """Read the key at `path`, or make one and have it certified; raises `Corrupt`."""
        if not path.exists():
            key = Ed25519PrivateKey.generate()
            certificate = authority.certify(key.public_key(), PURPOSE, time.time())
            pair = {"certificate": certificate.decode(), "key": key.private_bytes_raw().hex()}
            durable.replace(path, durable.dump_json(pair), mode=0o600)
        pair = durable.read_json(path)
        try:
            key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(pair["key"]))
            return cls(key, str(pair["certificate"]))
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"{path} is damaged ({error}); restore it from a backup") from error

    def seal(self, before: str, receipt: Receipt) -> Seal:
        """Return the seal of the receipt that follows the link `before`; `start` is the first."""
        link = _link(before, receipt)
        return Seal(link, self._key.sign(link.encode()).hex())


def start(run: RunId, plan: str) -> str:
    """Return what a run's first receipt is chained to."""
    return hashlib.sha256(durable.dump_json({"run": run, "plan": plan})).hexdigest()


def verify(detail: RunDetail, authority: bytes) -> str:
    """Return the head of a run's chain if every receipt is as it was signed.

    `authority` is the consortium's certificate (PEM). Raises `Untrusted`, naming the first
    receipt that was changed, added, moved or taken out.
    """
    run, link = detail.info.id, start(detail.info.id, detail.plan)
    if not detail.receipts and not detail.seals:
        return link
    key, span = _key(detail.sealer, authority)
    if len(detail.seals) != len(detail.receipts):
        raise Untrusted(
            f"{run}: {len(detail.receipts)} receipts and {len(detail.seals)} seals; alarm"
        )
    for number, (receipt, seal) in enumerate(zip(detail.receipts, detail.seals, strict=True), 1):
        what = f"{run}: receipt {number} ({receipt.kind} round {receipt.round})"
        if not seal.link:
            raise Untrusted(
                f"{what} bears no seal: it was taken off, or a coordinator that knew none wrote "
                "it; alarm"
            )
        link = _link(link, receipt)
        if receipt.run != run or link != seal.link:
            raise Untrusted(f"{what} or one before it was changed, added or taken out; alarm")
        try:
            key.verify(bytes.fromhex(seal.signature), link.encode())
        except (InvalidSignature, ValueError) as error:
            raise Untrusted(f"{what} is not signed by the coordinator; alarm") from error
        if not span[0] <= receipt.closed <= span[1]:
            raise Untrusted(f"{what} was closed when its key was not valid; alarm")
    return link


def _link(before: str, receipt: Receipt) -> str:
    record = to_record(receipt)
    record = to_record(from_record(Receipt, record, "receipt"))  # as it will be read again
    assert isinstance(record, dict)
    filled = {name: value for name, value in record.items() if value not in ("", 0, [], {})}
    return hashlib.sha256(before.encode() + durable.dump_json(filled)).hexdigest()


def _key(sealer: str, authority: bytes) -> tuple[Ed25519PublicKey, tuple[float, float]]:
    """Return the sealer's key and its time, if the authority certified it for receipts."""
    try:
        leaf = x509.load_pem_x509_certificate(sealer.encode())
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise Untrusted("the receipts' key is not certified by this authority; alarm") from error
    key = leaf.public_key()
    if uris != [PURPOSE] or not isinstance(key, Ed25519PublicKey):
        raise Untrusted(f"the receipts' key is certified for {uris}, not for receipts; alarm")
    return key, (leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp())
