"""Whatever lies in a folder, the doctor answers with findings or with one line of ours."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedml import durable
from fedml.coordinator.folder import create
from fedml.coordinator.settings import Settings
from fedml.doctor.examine import examine
from fedml.errors import FedmlError
from tests.doctor.ward import admit, allow
from tests.transport.world import GrpcPlace, World


def into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff\x00{"),
    "another JSON": lambda path: path.write_bytes(b"[1]\n"),
    "a folder": into_a_folder,
}


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[GrpcPlace]:
    place = GrpcPlace(World.build(tmp_path / "world"))
    await place.start()
    yield place
    await place.stop()


async def survive(folder: Path, copy: Path, damage: Callable[[Path], object]) -> int:
    """Damage one file after another, each in a fresh copy; return how many were not borne well."""
    noticed = 0
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    for name in files:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        damage(copy / name)
        try:
            noticed += any(finding.state != "ok" for finding in await examine(copy))
        except FedmlError as error:
            assert "\n" not in str(error)
            noticed += 1
    return noticed


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_coordinator_s_folder(tmp_path: Path, damage: str) -> None:
    create(tmp_path / "hub", Settings(port=0, enrolment_port=0))
    assert await survive(tmp_path / "hub", tmp_path / "copy", DAMAGES[damage])


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_site_s_folder(tmp_path: Path, place: GrpcPlace, damage: str) -> None:
    site = admit(tmp_path / "site", place.world.credentials())
    allow(site).unlink()  # nothing to read: the recipe is not what is damaged here
    durable.Log(site / "ledger" / "records.jsonl").close()
    durable.replace(site / "left.json", b"{}")
    assert await survive(site, tmp_path / "copy", DAMAGES[damage])
    (site / "left.json").unlink()
    assert await survive(site, tmp_path / "copy", DAMAGES[damage])


@pytest.mark.parametrize("value", [b"", b"x", b"\xc3\xa4", b"[::1]:x", b"127.0.0.1:99999"])
@pytest.mark.parametrize("part", ["address", "ca", "certificate", "key"])
async def test_papers_of_which_a_part_is_nonsense(
    place: GrpcPlace, tmp_path: Path, part: str, value: bytes
) -> None:
    nonsense = value.decode() if part == "address" else value
    replace(place.world.credentials(), **{part: nonsense}).save(tmp_path)  # type: ignore[arg-type]
    findings = await examine(tmp_path)
    assert any(finding.state == "fail" for finding in findings)
