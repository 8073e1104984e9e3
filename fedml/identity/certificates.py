"""Who speaks: a small certificate authority, and the identity that a certificate carries.

Keys are ECDSA P-256. A client's name and role stand in one URI of its certificate,
`spiffe://fedml/<role>/<name>`; the subject means nothing. Certificates are back-dated by five
minutes, for clocks that go slow. Times are seconds since the epoch, and `now` is an argument.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedml import durable
from fedml.errors import ConfigError, Corrupt, MalformedMessage, PermissionDenied
from fedml.protocol.messages import check_name
from fedml.protocol.operations import Role

DAY = 86_400.0
SKEW = 300.0  # seconds by which a peer's clock may be slow
CLIENT_DAYS = 30.0
ROOT_DAYS = 3650.0
MAX_CSR = 16 * 2**10  # bytes; a request for a P-256 key has about 400
_URI = re.compile(r"spiffe://fedml/([a-z]+)/([^/]+)")


@dataclass(frozen=True)
class Identity:
    """Who a certificate speaks for, from `issued` to `expires`, in seconds since the epoch."""

    name: str
    role: Role
    serial: int
    issued: float
    expires: float

    def __str__(self) -> str:
        return f"{self.role} {self.name}"


@dataclass(frozen=True)
class Credentials:
    """What a program needs to speak to the coordinator: its address, and keys as PEM."""

    address: str
    ca: bytes
    certificate: bytes
    key: bytes = field(repr=False)

    def save(self, folder: Path) -> None:
        """Write them as one file that only its owner reads, in one step, so parts always fit."""
        texts = {k: v if isinstance(v, str) else v.decode() for k, v in asdict(self).items()}
        durable.replace(folder / "identity.json", durable.dump_json(texts), mode=0o600)

    @classmethod
    def load(cls, folder: Path) -> Credentials:
        """Read what `save` wrote; raises `ConfigError` if there is none, `Corrupt` if damaged."""
        path = folder / "identity.json"
        texts = durable.read_json(path)
        try:
            values = [str(texts[f.name]) for f in fields(cls)]
        except (KeyError, TypeError) as error:
            raise Corrupt(f"{path} is damaged; restore it from a backup, or join again") from error
        return cls(values[0], *(value.encode() for value in values[1:]))


class Authority:
    """The consortium's certificate authority: its root key in a folder, and what it signs."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key, self._certificate = key, certificate

    @classmethod
    def create(cls, folder: Path, now: float) -> Authority:
        """Make a new root in `folder`; raises `ConfigError` if one is there already."""
        if (folder / "ca.json").exists():
            raise ConfigError(f"{folder} holds a certificate authority already; use that one")
        key = ec.generate_private_key(ec.SECP256R1())
        name = _subject("fedml root")
        certificate = (
            _builder(name, name, key.public_key(), now, ROOT_DAYS * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .sign(key, hashes.SHA256())
        )
        pair = {"certificate": _pem(certificate).decode(), "key": _key_pem(key).decode()}
        durable.replace(folder / "ca.json", durable.dump_json(pair), mode=0o600)
        return cls(key, certificate)

    @classmethod
    def load(cls, folder: Path) -> Authority:
        """Read the root that `create` made; raises `ConfigError` or `Corrupt`."""
        path = folder / "ca.json"
        pair = durable.read_json(path)
        try:
            key = serialization.load_pem_private_key(str(pair["key"]).encode(), None)
            certificate = x509.load_pem_x509_certificate(str(pair["certificate"]).encode())
        except (KeyError, TypeError, ValueError) as error:
            raise Corrupt(f"{path} is damaged ({error}); restore it from a backup") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise Corrupt(f"{path} holds a key of another kind; restore it from a backup")
        return cls(key, certificate)

    @property
    def certificate(self) -> bytes:
        """The root certificate, PEM."""
        return _pem(self._certificate)

    def fingerprint(self) -> str:
        """SHA-256 of the root certificate in hex, for people to compare by telephone."""
        return fingerprint(self.certificate)

    def issue(
        self, csr: bytes, name: str, role: Role, now: float, *, days: float = CLIENT_DAYS
    ) -> bytes:
        """Return a client certificate (PEM) for the key in `csr`; nothing else there counts.

        Raises `MalformedMessage` if `csr` is no request for a P-256 key, signed by that key.
        """
        uri = f"spiffe://fedml/{role}/{check_name(role, name)}"
        return self._leaf(
            public_key(csr), name, [x509.UniformResourceIdentifier(uri)], now, days * DAY
        )

    def issue_server(
        self, hosts: Sequence[str], now: float, *, days: float = 365.0
    ) -> tuple[bytes, bytes]:
        """Return a server certificate and its new key (PEM) for DNS names and IP addresses."""
        if not hosts:
            raise ConfigError("hosts: name at least one that sites will dial")
        key = ec.generate_private_key(ec.SECP256R1())
        names = [_host(host) for host in hosts]
        return self._leaf(key.public_key(), "coordinator", names, now, days * DAY), _key_pem(key)

    def certify(self, key: Ed25519PublicKey, purpose: str, now: float) -> bytes:
        """Return a certificate (PEM) for a key that signs, and opens no connection, for `purpose`.

        It lives as long as a root.
        """
        certificate = (
            _builder(_subject("fedml"), self._certificate.subject, key, now, ROOT_DAYS * DAY)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(purpose)]), False
            )
            .sign(self._key, hashes.SHA256())
        )
        return _pem(certificate)

    def _leaf(
        self,
        key: ec.EllipticCurvePublicKey,
        name: str,
        names: Sequence[x509.GeneralName],
        now: float,
        life: float,
    ) -> bytes:
        client = isinstance(names[0], x509.UniformResourceIdentifier)
        use = ExtendedKeyUsageOID.CLIENT_AUTH if client else ExtendedKeyUsageOID.SERVER_AUTH
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            _builder(_subject(name), self._certificate.subject, key, now, life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return _pem(certificate)


def new_key_and_csr(name: str) -> tuple[bytes, bytes]:
    """Return a new private key and a certificate request for it, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return _key_pem(key), csr_for(_key_pem(key), name)


def csr_for(key: bytes, name: str) -> bytes:
    """Return a certificate request (PEM) for a private key that is there already."""
    try:
        private = serialization.load_pem_private_key(key, None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
    except (ValueError, TypeError) as error:
        raise Corrupt(f"the private key does not read ({error}); join again") from error
    request = x509.CertificateSigningRequestBuilder().subject_name(_subject(name))
    return request.sign(private, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def public_key(csr: bytes) -> ec.EllipticCurvePublicKey:
    """Return the key that `csr` asks a certificate for; raises `MalformedMessage`."""
    if len(csr) > MAX_CSR:
        raise MalformedMessage(f"a certificate request of {len(csr)} bytes, limit {MAX_CSR}")
    try:
        request = x509.load_pem_x509_csr(csr)
        signed, key = request.is_signature_valid, request.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise MalformedMessage("the certificate request does not read") from error
    if not signed:
        raise MalformedMessage("the certificate request is not signed by its own key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise MalformedMessage("the certificate request is for another key than ECDSA P-256")
    return key


def key_digest(csr: bytes) -> str:
    """Return the SHA-256 of the public key in `csr`, in hex; raises `MalformedMessage`."""
    spki = public_key(csr).public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(spki).hexdigest()


def identity_of(certificate: bytes, now: float) -> Identity:
    """Return who a client certificate (PEM) speaks for; its chain was checked by TLS.

    Raises `PermissionDenied` as `identity_in` does, or if it is out of its time.
    """
    identity = identity_in(certificate)
    check_in_time(identity, now)
    return identity


def identity_in(certificate: bytes) -> Identity:
    """Return who a client certificate (PEM) speaks for, or did, or will.

    Raises `PermissionDenied` if it names no one, or an unknown role.
    """
    try:
        leaf = x509.load_pem_x509_certificate(certificate)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as error:
        raise PermissionDenied("the certificate names no one; join with a token") from error
    match = _URI.fullmatch(uris[0]) if len(uris) == 1 else None
    role = next((word for word in get_args(Role) if match and match[1] == word), None)
    if match is None or role is None:
        raise PermissionDenied(f"the certificate is for {uris}, expected spiffe://fedml/ROLE/NAME")
    try:
        name = check_name("certificate for", match[2])
    except ConfigError as error:
        raise PermissionDenied(str(error)) from error
    start = leaf.not_valid_before_utc.timestamp()
    end = leaf.not_valid_after_utc.timestamp()
    return Identity(name, role, leaf.serial_number, start + SKEW, end)


def check_in_time(identity: Identity, now: float) -> None:
    """Raise `PermissionDenied` if the certificate behind `identity` is out of its time."""
    if now >= identity.expires:
        raise PermissionDenied(f"the certificate of {identity} expired; join with a new token")
    if now < identity.issued - SKEW:
        raise PermissionDenied(f"the certificate of {identity} lies in the future; set the clock")


def fingerprint(certificate: bytes) -> str:
    """SHA-256 of a certificate (PEM) in hex; raises `ConfigError` if it is none."""
    try:
        return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()
    except ValueError as error:
        raise ConfigError("this is no certificate in PEM form") from error


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey | Ed25519PublicKey,
    now: float,
    life: float,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_utc(now - SKEW))
        .not_valid_after(_utc(now + life))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _utc(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
