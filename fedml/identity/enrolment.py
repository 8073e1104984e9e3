"""How a newcomer gets its first certificate: one-time join tokens, kubeadm style.

A token names the enrolment address, carries the authority's certificate, so the very first
handshake is a verified one, and a secret of which we keep only the hash. Name and role were set
when it was minted; what the newcomer writes into its certificate request counts for nothing.

A token serves one key once. The same key may ask again until the token expires: its owner gets
the same identity, so an answer lost on the way costs nothing, and a thief gains nothing.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import math
import secrets
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedml import durable
from fedml.durable import Log, Record
from fedml.errors import ConfigError, PermissionDenied
from fedml.identity.access import Revocations
from fedml.identity.certificates import Authority, Identity, fingerprint, key_digest
from fedml.protocol.messages import check_name
from fedml.protocol.operations import Invitation, Role
from fedml.protocol.requests import Admission

MAX_TTL = 30 * 86_400.0  # seconds; a token that lies about longer is a risk and no help
_PREFIX = "fedml1"


@dataclass(frozen=True)
class Token:
    """What an operator pastes at a new site: where to join, whom to trust there, and the secret."""

    id: str
    secret: str = field(repr=False)
    address: str
    ca: bytes  # the authority's certificate, PEM

    @property
    def pin(self) -> str:
        """The authority's fingerprint; equal to `Authority.fingerprint` of the right one."""
        return fingerprint(self.ca)

    def text(self) -> str:
        """Return the token as one word without spaces."""
        der = x509.load_pem_x509_certificate(self.ca).public_bytes(Encoding.DER)
        parts = [self.id, self.secret, self.address, base64.b64encode(der).decode()]
        body = base64.urlsafe_b64encode(durable.dump_json(parts)).decode().rstrip("=")
        return f"{_PREFIX}.{body}.{zlib.crc32(body.encode()):08x}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read what `text` wrote; raises `ConfigError` if it is cut, mistyped or no token."""
        prefix, _, rest = "".join(text.split()).partition(".")
        body, _, checksum = rest.partition(".")
        if prefix != _PREFIX:
            raise ConfigError(f"a join token starts with '{_PREFIX}.'; copy it whole")
        if checksum != f"{zlib.crc32(body.encode()):08x}":
            raise ConfigError(
                f"the join token ({len(text)} characters) is cut or mistyped; copy it whole"
            )
        try:
            parts = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
            id_, secret, address, der = (str(part) for part in parts)
            ca = x509.load_der_x509_certificate(base64.b64decode(der, validate=True))
        except (ValueError, TypeError, binascii.Error) as error:
            raise ConfigError("the join token does not read; ask for a new one") from error
        return cls(id_, secret, address, ca.public_bytes(Encoding.PEM))


class Invitations:
    """The tokens that were minted, and which key each one served; kept in one durable log."""

    def __init__(self, path: Path) -> None:
        self._log = Log(path)
        self._minted: dict[str, Record] = {}
        self._served: dict[str, str] = {}  # token id to key digest; "" once it is void
        for record in self._log.records:
            self._apply(record)

    def mint(self, name: str, role: Role, ttl: float, now: float) -> tuple[str, str]:
        """Return id and secret of a new token for `name`; it dies `ttl` seconds from `now`."""
        check_name(role, name)
        if not (math.isfinite(ttl) and 0 < ttl <= MAX_TTL):
            raise ConfigError(f"ttl {ttl} s: above 0 and at most {MAX_TTL:.0f} (30 days)")
        id_, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        self._note(
            {
                "what": "minted",
                "id": id_,
                "hash": _hash(secret),
                "name": name,
                "role": role,
                "expires": now + ttl,
            }
        )
        return id_, secret

    def redeem(self, id_: str, secret: str, csr: bytes, now: float) -> tuple[str, Role]:
        """Spend a token on the key in `csr`; return the name and role to issue.

        Raises `PermissionDenied`, without saying how near a guess came, or `MalformedMessage`.
        """
        key = key_digest(csr)
        record = self._minted.get(id_)
        expected = str(record["hash"]) if record else _hash("")
        if not hmac.compare_digest(expected, _hash(secret)) or record is None:
            raise PermissionDenied("the join token is unknown here; ask for a new one")
        if now >= record["expires"]:
            raise PermissionDenied("the join token expired; ask for a new one")
        served = self._served.get(id_)
        if served is None:
            self._note({"what": "served", "id": id_, "key": key})
        elif served != key:
            raise PermissionDenied("the join token was used already; ask for a new one")
        return record["name"], record["role"]

    def void(self, name: str) -> None:
        """Make every token minted for `name` so far worthless."""
        for id_, record in self._minted.items():
            if record["name"] == name and self._served.get(id_) != "":
                self._note({"what": "served", "id": id_, "key": ""})

    def _note(self, record: Record) -> None:
        self._log.append(record)
        self._apply(record)

    def _apply(self, record: Record) -> None:
        if record["what"] == "minted":
            self._minted[record["id"]] = record
        else:
            self._served[record["id"]] = record["key"]


@dataclass(frozen=True)
class Registrar:
    """The coordinator's desk for newcomers: mints tokens, admits, renews and revokes.

    `enrolment` and `federation` are the addresses that sites dial.
    """

    authority: Authority
    invitations: Invitations
    revocations: Revocations
    enrolment: str
    federation: str

    def invite(self, name: str, role: Role, ttl: float, now: float) -> Invitation:
        """Mint a token; its text is in the invitation and nowhere else."""
        id_, secret = self.invitations.mint(name, role, ttl, now)
        token = Token(id_, secret, self.enrolment, self.authority.certificate)
        return Invitation(token.text(), name, role, now + ttl)

    def join(self, id_: str, secret: str, csr: bytes, now: float) -> Admission:
        """Admit the holder of a token; raises `PermissionDenied` or `MalformedMessage`."""
        name, role = self.invitations.redeem(id_, secret, csr, now)
        return self._admit(csr, name, role, now)

    def renew(self, identity: Identity, csr: bytes, now: float) -> Admission:
        """Give a known caller a fresh certificate for the same name and role."""
        return self._admit(csr, identity.name, identity.role, now)

    def revoke(self, name: str, now: float) -> None:
        """Refuse all certificates and tokens that `name` was given so far."""
        self.revocations.revoke(name, now)
        self.invitations.void(name)

    def _admit(self, csr: bytes, name: str, role: Role, now: float) -> Admission:
        certificate = self.authority.issue(csr, name, role, now)
        return Admission(certificate, self.authority.certificate, self.federation)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
