"""A certificate says who speaks, in one URI, for a while, and only our authority makes one."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedml.errors import ConfigError, Corrupt, MalformedMessage, PermissionDenied
from fedml.identity.certificates import (
    DAY,
    Authority,
    Credentials,
    fingerprint,
    identity_of,
    key_digest,
    new_key_and_csr,
)

NOW = 1_800_000_000.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "ca", NOW)


def test_an_issued_certificate_names_its_holder_for_thirty_days(authority: Authority) -> None:
    _, csr = new_key_and_csr("someone else")
    identity = identity_of(authority.issue(csr, "mercy", "site", NOW), NOW)
    assert (identity.name, identity.role) == ("mercy", "site")
    assert identity.issued == NOW
    assert identity.expires == NOW + 30 * DAY
    assert str(identity) == "site mercy"


def test_a_client_certificate_cannot_act_as_a_server_nor_sign(authority: Authority) -> None:
    _, csr = new_key_and_csr("mercy")
    leaf = x509.load_pem_x509_certificate(authority.issue(csr, "mercy", "site", NOW))
    use = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(use) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_a_clock_that_is_five_minutes_slow_is_forgiven_and_not_more(authority: Authority) -> None:
    _, csr = new_key_and_csr("mercy")
    certificate = authority.issue(csr, "mercy", "site", NOW)
    assert identity_of(certificate, NOW - 299)
    with pytest.raises(PermissionDenied, match="lies in the future; set the clock"):
        identity_of(certificate, NOW - 301)


def test_an_expired_certificate_is_refused(authority: Authority) -> None:
    _, csr = new_key_and_csr("mercy")
    certificate = authority.issue(csr, "mercy", "site", NOW, days=1)
    assert identity_of(certificate, NOW + DAY - 1)
    with pytest.raises(PermissionDenied, match="site mercy expired; join with a new token"):
        identity_of(certificate, NOW + DAY)


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["https://example.org"],
        ["spiffe://fedml/site/mercy", "spiffe://fedml/operator/mercy"],
        ["spiffe://fedml/root/mercy"],
        ["spiffe://fedml/site/mercy/more"],
        ["spiffe://fedml/site/UPPER"],
        ["spiffe://fedml/site/"],
        ["spiffe://elsewhere/site/mercy"],
    ],
)
def test_a_certificate_that_does_not_name_one_known_role_is_refused(uris: list[str]) -> None:
    start = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=1))
    )
    if uris:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(PermissionDenied):
        identity_of(pem, NOW)


def test_a_server_certificate_is_no_identity(authority: Authority) -> None:
    certificate, _ = authority.issue_server(["localhost", "127.0.0.1"], NOW)
    names = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert names.value.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(ip) for ip in names.value.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    with pytest.raises(PermissionDenied, match="expected spiffe"):
        identity_of(certificate, NOW)
    with pytest.raises(ConfigError, match="at least one"):
        authority.issue_server([], NOW)


def test_the_root_survives_a_restart_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path, NOW)
    again = Authority.load(tmp_path)
    assert again.fingerprint() == authority.fingerprint() == fingerprint(again.certificate)
    root = x509.load_pem_x509_certificate(authority.certificate)
    certificate = again.issue(new_key_and_csr("a")[1], "a", "viewer", NOW)
    x509.load_pem_x509_certificate(certificate).verify_directly_issued_by(root)
    assert stat.S_IMODE((tmp_path / "ca.json").stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="holds a certificate authority already"):
        Authority.create(tmp_path, NOW)


def test_a_damaged_root_is_named(tmp_path: Path) -> None:
    Authority.create(tmp_path, NOW)
    (tmp_path / "ca.json").write_text('{"key": "x", "certificate": "y"}')
    with pytest.raises(Corrupt, match=r"ca\.json is damaged"):
        Authority.load(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        Authority.load(tmp_path / "elsewhere")


def test_a_request_signed_by_another_key_is_refused(authority: Authority) -> None:
    _, csr = new_key_and_csr("mercy")
    der = bytearray(x509.load_pem_x509_csr(csr).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(MalformedMessage, match="signed by its own key"):
        authority.issue(forged, "mercy", "site", NOW)


def test_a_request_for_another_kind_of_key_is_refused(authority: Authority) -> None:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    for key in (rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP384R1())):
        csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        with pytest.raises(MalformedMessage, match="ECDSA P-256"):
            authority.issue(csr, "mercy", "site", NOW)


@given(st.binary(max_size=300))
def test_garbage_in_place_of_a_request_is_malformed(data: bytes) -> None:
    for csr in (data, b"-----BEGIN CERTIFICATE REQUEST-----\n" + data):
        with pytest.raises(MalformedMessage):
            key_digest(csr)


def test_a_request_has_a_limit() -> None:
    with pytest.raises(MalformedMessage, match="limit 16384"):
        key_digest(b"x" * 16_385)


def test_credentials_survive_the_disk_and_hide_the_key(tmp_path: Path) -> None:
    mine = Credentials("host:1", b"ca", b"certificate", b"secret key")
    mine.save(tmp_path)
    assert Credentials.load(tmp_path) == mine
    assert "secret" not in repr(mine)
    assert stat.S_IMODE((tmp_path / "identity.json").stat().st_mode) == 0o600
    (tmp_path / "identity.json").write_text("{}")
    with pytest.raises(Corrupt, match=r"identity\.json is damaged"):
        Credentials.load(tmp_path)
