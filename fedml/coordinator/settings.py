"""What a coordinator is: its addresses and its registry, in `coordinator.toml`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fedml import settings
from fedml.errors import ConfigError

PARENT = Path("parent")  # in a region's folder: the papers by which its parent knows it
RELEASES = PARENT / "releases"  # the parent's, which go when those go
_PORTS = ("port", "enrolment_port", "health_port")


@dataclass(frozen=True)
class Settings:
    """A coordinator's settings; 0 as a port takes a free one.

    `host` is the name by which sites and operators reach it, and is in its certificate; `bind`
    is the address it listens on. `registry` is an MLflow tracking URI, or NAME:PLACE of an
    installed package's; "" keeps a SQLite file in the folder. `grace` is how many seconds a site
    may be away before its task counts as lost. `runs_at_once` is how many runs are played at a
    time; the others wait in order. `drain` is how many seconds open rounds may take once the
    coordinator is told to stop. On `health_port` are /healthz, /readyz and /metrics, for whoever
    reaches `health_bind`.
    """

    host: str = "localhost"
    bind: str = "127.0.0.1"
    port: int = 8443
    enrolment_port: int = 8444
    registry: str = ""
    heartbeat: float = 5.0
    grace: float = 5.0
    blob_limit_mb: int = 4096
    runs_at_once: int = 4
    drain: float = 30.0
    health_bind: str = "127.0.0.1"
    health_port: int = 0

    def __post_init__(self) -> None:
        ports = {name: getattr(self, name) for name in _PORTS}
        for port in ports.values():
            if not 0 <= port < 65536:
                raise ConfigError(f"port {port}: must be 0 to 65535")
            same = [name for name in ports if ports[name] == port != 0]
            if len(same) > 1:
                raise ConfigError(f"{' and '.join(same)} are both {port}: they must differ")
        if min(self.heartbeat, self.grace) <= 0 or self.blob_limit_mb < 1:
            raise ConfigError(
                f"heartbeat {self.heartbeat}, grace {self.grace}, blob_limit_mb "
                f"{self.blob_limit_mb}: each must be above 0"
            )
        if self.runs_at_once < 1:
            raise ConfigError(f"runs_at_once {self.runs_at_once}: must be 1 or more")
        if not 0 <= self.drain < math.inf:
            raise ConfigError(f"drain {self.drain}: give the seconds, 0 or more")


def is_region(folder: Path) -> bool:
    """True if the coordinator in `folder` has joined a parent."""
    return (folder / PARENT / "identity.json").exists()


def read_settings(folder: Path) -> Settings:
    """Read `coordinator.toml`; raises `ConfigError` with every wrong key."""
    return settings.read(
        Settings,
        folder / "coordinator.toml",
        absent=f"{folder} is no coordinator folder yet: run 'fedml coordinator init {folder}'",
    )
