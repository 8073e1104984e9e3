"""A site that leaves is shut out by its own wish, keeps its folder, and may come back."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedml import durable
from fedml.cli.endpoint import Site
from fedml.cli.main import app
from fedml.errors import ConfigError, Corrupt, PermissionDenied, Unreachable
from fedml.site.departure import check_member, come_back, departure, leave
from fedml.site.settings import read_settings
from tests.doctor.ward import admit, print_of
from tests.transport.world import HELLO, GrpcPlace, World


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[GrpcPlace]:
    place = GrpcPlace(World.build(tmp_path / "hub"))
    await place.start()
    yield place
    await place.stop()


@pytest.fixture
def site(place: GrpcPlace, tmp_path: Path) -> Path:
    return admit(tmp_path / "mercy", place.world.credentials())


async def go(site: Path, place: GrpcPlace) -> None:
    link = place.link()
    try:
        await leave(site, read_settings(site), link, time.time())
    finally:
        await link.close()


async def test_who_has_left_is_refused_and_keeps_all_its_files(
    site: Path, place: GrpcPlace
) -> None:
    link, before = place.link(), print_of(site)
    check_member(site)
    await go(site, place)
    with pytest.raises(PermissionDenied, match="was revoked"):
        await link.connect(HELLO)
    await link.close()
    mark = departure(site)
    assert mark is not None
    assert mark.told
    assert {k: v for k, v in print_of(site).items() if "left.json" not in k} == before


async def test_a_site_that_has_left_does_not_run_and_says_how_to_come_back(
    site: Path, place: GrpcPlace
) -> None:
    await go(site, place)
    with pytest.raises(ConfigError, match=rf"mercy left .*fedml site join TOKEN --dir {site}'$"):
        await Site(site).run()
    come_back(site)
    check_member(site)


async def test_a_coordinator_that_is_away_is_told_the_next_time(
    site: Path, place: GrpcPlace
) -> None:
    await place.stop()
    with pytest.raises(Unreachable):
        await go(site, place)
    with pytest.raises(ConfigError, match="which has not been told yet"):
        check_member(site)
    assert not place.world.revocations._names
    await place.start()
    await go(site, place)
    with pytest.raises(ConfigError, match=r"on \d{4}-\d\d-\d\d; to come back"):
        check_member(site)
    assert "mercy" in place.world.revocations._names


async def test_who_was_revoked_before_may_leave_all_the_same(site: Path, place: GrpcPlace) -> None:
    place.world.revocations.revoke("mercy", time.time())
    await go(site, place)
    mark = departure(site)
    assert mark is not None
    assert mark.told


def test_the_command_asks_and_says_what_to_do_while_the_coordinator_is_away(
    tmp_path: Path,
) -> None:
    papers = replace(World.build(tmp_path / "hub").credentials(), address="127.0.0.1:1")
    site = admit(tmp_path / "mercy", papers)
    asked = CliRunner().invoke(app, ["site", "leave", str(site)], input="n\n")
    assert asked.exit_code == 1
    assert "mercy leaves 127.0.0.1:1, and needs a new token to come back" in asked.output
    assert departure(site) is None
    with durable.lock(site, "a site daemon"):
        busy = CliRunner().invoke(app, ["site", "leave", str(site), "--yes"])
    assert "is in use by a site daemon" in str(busy.exception)
    assert departure(site) is None
    away = CliRunner().invoke(app, ["site", "leave", str(site), "--yes"])
    assert isinstance(away.exception, Unreachable)
    assert "have its operator run 'fedml coordinator revoke mercy'" in str(away.exception)
    mark = departure(site)
    assert mark is not None
    assert not mark.told


def test_a_mark_that_does_not_read(tmp_path: Path) -> None:
    (tmp_path / "left.json").write_text("{}")
    with pytest.raises(Corrupt, match="run 'fedml site leave' again"):
        departure(tmp_path)
