"""A fleet of two levels: two regions between the coordinator and three sites, all real programs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fedml.cli.demo.federation import free_ports
from fedml.coordinator.folder import create
from fedml.coordinator.settings import PARENT, Settings
from fedml.identity.certificates import Authority, Credentials, new_key_and_csr
from fedml.protocol.messages import SiteId
from fedml.rounds import Plan
from tests.faults import fleet
from tests.faults.fleet import Fleet, Program

REGIONS: Mapping[str, tuple[str, ...]] = {"north": ("bern", "oslo"), "south": ("riga",)}
LEAVES = tuple(site for sites in REGIONS.values() for site in sites)
AWAY = 60.0  # seconds that whoever is killed may be away


def plan(seed: int, *, private: bool = False) -> Plan:
    """Return a run of two rounds and an evaluation that asks every leaf each time."""
    base = fleet.plan(seed, private=private, rounds=2, deadline=90.0)
    sites = tuple(map(SiteId, LEAVES))
    return replace(base, cohort=replace(base.cohort, quorum=len(sites), sites=sites))


class Grove(Fleet):
    """As a fleet, and the sites dial their region."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, LEAVES, grace=AWAY)
        ports = free_ports(2 * len(REGIONS))
        self._ports = dict(zip(REGIONS, zip(ports[::2], ports[1::2], strict=True), strict=True))

    @property
    def programs(self) -> tuple[str, ...]:
        return (fleet.COORDINATOR, *REGIONS, *self.sites)

    def region(self, name: str) -> Path:
        """Return a region's folder."""
        return self.folder / "regions" / name

    def above(self, site: str) -> Path:
        return self.region(next(name for name, sites in REGIONS.items() if site in sites))

    def grow(self) -> Grove:
        """Make all folders and start all programs."""
        for name, (port, enrolment_port) in self._ports.items():
            settings = Settings(port=port, enrolment_port=enrolment_port, **self._settings)  # type: ignore[arg-type]
            create(self.region(name), settings)
        ports = {site: self._ports[self.above(site).name][0] for site in self.sites}
        self.make({site: f"localhost:{port}" for site, port in ports.items()})
        for name in REGIONS:
            self._adopt(name)
        for name in self.programs:
            self.launch(name)
        self.until_all_are_here()
        return self

    def _adopt(self, name: str) -> None:
        """Let the hub know a region, as `fedml coordinator join` does."""
        authority = Authority.load(self.hub / "ca")
        key, csr = new_key_and_csr(name)
        certificate = authority.issue(csr, name, "region", time.time())
        papers = Credentials(f"localhost:{self.port}", authority.certificate, certificate, key)
        papers.save(self.region(name) / PARENT)

    def program(self, name: str) -> Program:
        if name in REGIONS:
            strikes = self.folder / "strikes" / name
            return Program(("coordinator", "run", str(self.region(name))), strikes)
        return super().program(name)
