"""Keys and certificates that are old, foreign, open to others or damaged are found out."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedml import durable
from fedml.coordinator.folder import create
from fedml.coordinator.settings import Settings
from fedml.doctor import papers
from fedml.doctor.finding import DAY, Finding
from fedml.identity.certificates import Authority, Credentials, new_key_and_csr
from tests.doctor.ward import bad, found
from tests.transport.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.build(tmp_path)


def looked_at(own: Credentials, later: float = 0.0) -> dict[str, Finding]:
    now = time.time() + later
    return {f.what: f for f in papers.credentials(own, now, renewal="run the daemon")}


def test_good_papers(world: World) -> None:
    findings = looked_at(world.credentials())
    assert [f.state for f in findings.values()] == ["ok", "ok", "ok"]
    assert "site mercy" in findings["certificate"].found
    assert "expires in 30 days" in findings["certificate"].found
    assert world.authority.fingerprint() in findings["authority"].found


@pytest.mark.parametrize(("age", "state"), [(20, "ok"), (22, "warn"), (31, "fail")])
def test_a_certificate_that_grows_old(world: World, age: float, state: str) -> None:
    finding = looked_at(world.credentials(age=age * DAY))["certificate"]
    assert finding.state == state
    if state == "warn":
        assert finding.advice == "run the daemon"
    if state == "fail":
        assert "expired" in finding.found
        assert "join with a new token" in finding.advice


def test_a_certificate_of_the_future_is_a_matter_of_the_clock(world: World) -> None:
    finding = looked_at(world.credentials(), -DAY)["certificate"]
    assert (finding.state, finding.advice) == ("fail", "set the clock")


def test_a_key_that_does_not_fit(world: World) -> None:
    other = new_key_and_csr("mercy")[0]
    assert looked_at(replace(world.credentials(), key=other))["key"].state == "fail"
    assert looked_at(replace(world.credentials(), key=b"no key"))["key"].state == "fail"


def test_a_certificate_of_another_authority(world: World, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", time.time()).certificate
    finding = looked_at(replace(world.credentials(), ca=other))["certificate"]
    assert finding.state == "fail"
    assert "another authority" in finding.found


def test_an_authority_that_grows_old(world: World) -> None:
    assert looked_at(world.credentials(), 3600 * DAY)["authority"].state == "warn"
    assert looked_at(world.credentials(), 3700 * DAY)["authority"].state == "fail"


def test_a_key_that_others_may_read(world: World, tmp_path: Path) -> None:
    world.credentials().save(tmp_path)
    path = tmp_path / "identity.json"
    assert [f.state for f in papers.private(path)] == ["ok"]
    path.chmod(0o640)
    [finding] = papers.private(path)
    assert finding.state == "fail"
    assert finding.advice == f"chmod 600 {path}"


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"address":1}', b"\xff"])
async def test_a_damaged_profile_is_one_finding(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "identity.json").write_bytes(text)
    assert "is damaged" in bad(await found(tmp_path))["certificate"]


@pytest.mark.parametrize("part", ["ca", "certificate"])
async def test_a_profile_whose_certificate_does_not_read(
    world: World, tmp_path: Path, part: str
) -> None:
    replace(world.credentials(), **{part: b"no PEM"}).save(tmp_path)  # type: ignore[arg-type]
    findings = bad(await found(tmp_path))
    assert findings.keys() >= {"certificate"}


async def test_a_coordinator_s_authority_with_another_key(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    create(hub, Settings(port=0, enrolment_port=0))
    assert bad(await found(hub)) == {}
    path = hub / "ca" / "ca.json"
    other = Authority.create(tmp_path / "other", time.time())
    pair = {**durable.read_json(path), "certificate": other.certificate.decode()}
    durable.replace(path, durable.dump_json(pair), mode=0o600)
    assert "does not fit its certificate" in bad(await found(hub))["authority"]


async def test_release_metadata_that_nobody_renews(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    create(hub, Settings(port=0, enrolment_port=0))
    states = {}
    for days in (1, 6, 8):
        now = time.time() + days * DAY
        states[days] = (await found(hub, lambda now=now: now))["release timestamp"].state  # type: ignore[misc]
    assert states == {1: "ok", 6: "warn", 8: "fail"}
