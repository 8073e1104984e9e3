"""A token admits one key, once, for a while, as whom it was minted for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedml.errors import ConfigError, MalformedMessage, PermissionDenied
from fedml.identity.access import Access, Revocations
from fedml.identity.certificates import Authority, identity_of, new_key_and_csr
from fedml.identity.enrolment import Invitations, Registrar, Token

NOW = 1_800_000_000.0


@pytest.fixture
def registrar(tmp_path: Path) -> Registrar:
    return Registrar(
        Authority.create(tmp_path / "ca", NOW),
        Invitations(tmp_path / "invitations.log"),
        Revocations(tmp_path / "revocations.log"),
        "join.example.org:8444",
        "fed.example.org:8443",
    )


def invite(registrar: Registrar, ttl: float = 3600.0) -> Token:
    return Token.parse(registrar.invite("mercy", "site", ttl, NOW).token)


def test_a_token_carries_the_address_and_the_authority(registrar: Registrar) -> None:
    token = invite(registrar)
    assert token.address == "join.example.org:8444"
    assert token.pin == registrar.authority.fingerprint()
    assert Token.parse(token.text()) == token
    assert token.secret not in repr(token)


def test_a_token_may_be_wrapped_by_a_mail_program(registrar: Registrar) -> None:
    text = invite(registrar).text()
    assert Token.parse(f" {text[:70]}\n {text[70:]}\n") == Token.parse(text)


def test_identity_comes_from_the_token_and_not_from_the_request(registrar: Registrar) -> None:
    token = invite(registrar)
    admission = registrar.join(token.id, token.secret, new_key_and_csr("evil-other")[1], NOW)
    identity = identity_of(admission.certificate, NOW)
    assert (identity.name, identity.role) == ("mercy", "site")
    assert b"evil" not in admission.certificate
    assert admission.address == "fed.example.org:8443"


def test_a_token_serves_one_key_only_even_after_a_restart(
    registrar: Registrar, tmp_path: Path
) -> None:
    token, (_, mine) = invite(registrar), new_key_and_csr("a")
    registrar.invitations.redeem(token.id, token.secret, mine, NOW)
    for invitations in (registrar.invitations, Invitations(tmp_path / "invitations.log")):
        with pytest.raises(PermissionDenied, match="was used already; ask for a new one"):
            invitations.redeem(token.id, token.secret, new_key_and_csr("b")[1], NOW)


def test_the_same_key_may_ask_again_when_the_answer_was_lost(registrar: Registrar) -> None:
    token, (_, mine) = invite(registrar), new_key_and_csr("a")
    for _ in range(2):
        assert registrar.invitations.redeem(token.id, token.secret, mine, NOW)[0] == "mercy"
    with pytest.raises(PermissionDenied, match="expired"):
        registrar.invitations.redeem(token.id, token.secret, mine, NOW + 3600)


def test_an_expired_token_is_refused_also_after_a_restart(
    registrar: Registrar, tmp_path: Path
) -> None:
    token, (_, mine) = invite(registrar, ttl=60), new_key_and_csr("a")
    for invitations in (registrar.invitations, Invitations(tmp_path / "invitations.log")):
        with pytest.raises(PermissionDenied, match="the join token expired; ask for a new one"):
            invitations.redeem(token.id, token.secret, mine, NOW + 60)
    assert registrar.invitations.redeem(token.id, token.secret, mine, NOW + 59)


def test_a_wrong_secret_and_an_unknown_id_sound_the_same(registrar: Registrar) -> None:
    token, (_, mine) = invite(registrar), new_key_and_csr("a")
    lines = set()
    for id_, secret in [
        (token.id, "guess"),
        ("guess", token.secret),
        ("", ""),
        (token.id, "\ud800"),
    ]:
        with pytest.raises(PermissionDenied) as caught:
            registrar.invitations.redeem(id_, secret, mine, NOW)
        lines.add(str(caught.value))
    assert len(lines) == 1
    assert registrar.invitations.redeem(token.id, token.secret, mine, NOW)  # guesses cost nothing


def test_a_malformed_request_does_not_spend_the_token(registrar: Registrar) -> None:
    token = invite(registrar)
    with pytest.raises(MalformedMessage):
        registrar.join(token.id, token.secret, b"garbage", NOW)
    assert registrar.join(token.id, token.secret, new_key_and_csr("a")[1], NOW)


def test_the_secret_is_not_on_the_coordinators_disk(registrar: Registrar, tmp_path: Path) -> None:
    token = invite(registrar)
    assert token.secret not in (tmp_path / "invitations.log").read_text()


def test_revoking_a_name_stops_its_certificates_and_tokens_until_it_is_invited_anew(
    registrar: Registrar,
) -> None:
    token, (_, csr) = invite(registrar), new_key_and_csr("a")
    unused = invite(registrar)
    identity = identity_of(registrar.join(token.id, token.secret, csr, NOW).certificate, NOW)
    access = Access(registrar.revocations)
    access.check(identity, "Federation/Connect", NOW)
    registrar.revoke("mercy", NOW + 10)
    with pytest.raises(PermissionDenied, match="was revoked"):
        access.check(identity, "Federation/Connect", NOW + 11)
    for old in (token, unused):
        with pytest.raises(PermissionDenied, match="was used already"):
            registrar.join(old.id, old.secret, csr, NOW + 11)
    fresh = Token.parse(registrar.invite("mercy", "site", 60, NOW + 20).token)
    again = registrar.join(fresh.id, fresh.secret, csr, NOW + 20)
    access.check(identity_of(again.certificate, NOW + 20), "Federation/Connect", NOW + 20)
    with pytest.raises(PermissionDenied, match="was revoked"):
        access.check(identity, "Federation/Connect", NOW + 21)


def test_renewal_keeps_name_and_role(registrar: Registrar) -> None:
    token = invite(registrar)
    first = registrar.join(token.id, token.secret, new_key_and_csr("a")[1], NOW)
    old = identity_of(first.certificate, NOW)
    later = NOW + 20 * 86_400
    new = identity_of(registrar.renew(old, new_key_and_csr("root")[1], later).certificate, later)
    assert (new.name, new.role) == (old.name, old.role)
    assert new.expires > old.expires


@pytest.mark.parametrize("ttl", [0.0, -1.0, float("inf"), float("nan"), 31 * 86_400.0])
def test_a_token_must_live_a_sensible_while(registrar: Registrar, ttl: float) -> None:
    with pytest.raises(ConfigError, match="ttl"):
        registrar.invite("mercy", "site", ttl, NOW)


def test_a_token_for_an_impossible_name_is_not_minted(registrar: Registrar) -> None:
    with pytest.raises(ConfigError, match=r"site '\.\./etc'"):
        registrar.invite("../etc", "site", 60, NOW)


def test_a_cut_token_is_told_from_a_whole_one_at_any_length(registrar: Registrar) -> None:
    text = invite(registrar).text()
    for length in range(len(text)):
        with pytest.raises(ConfigError, match="copy it whole"):
            Token.parse(text[:length])
    with pytest.raises(ConfigError, match="cut or mistyped"):
        Token.parse(text[:300] + ("B" if text[300] == "A" else "A") + text[301:])


@given(st.one_of(st.text(), st.text().map("fedml1.".__add__)))
def test_any_other_text_is_no_token_and_nothing_else(text: str) -> None:
    with pytest.raises(ConfigError):
        Token.parse(text)
