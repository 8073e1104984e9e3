"""What a site is: its name, its coordinator and its ports, in `site.toml`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from fedml import settings
from fedml.errors import ConfigError
from fedml.protocol.messages import check_name


@dataclass(frozen=True)
class Settings:
    """A site's own settings. Ports are those of its inference endpoint; 0 takes a free one.

    `drain` is how many seconds tasks under way may take once the daemon is told to stop.
    """

    name: str
    coordinator: str  # host:port
    serve_host: str = "127.0.0.1"
    rest_port: int = 8400
    grpc_port: int = 8401
    drain: float = 30.0

    def __post_init__(self) -> None:
        check_name("site", self.name)
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"coordinator {self.coordinator!r}: write host:port")
        for port_number in (self.rest_port, self.grpc_port):
            if not 0 <= port_number < 65536:
                raise ConfigError(f"port {port_number}: must be 0 to 65535")
        if not 0 <= self.drain < math.inf:
            raise ConfigError(f"drain {self.drain}: give the seconds, 0 or more")


def read_settings(folder: Path) -> Settings:
    """Read `site.toml` in a site's folder; raises `ConfigError` with every wrong key."""
    return settings.read(
        Settings,
        folder / "site.toml",
        absent=f"{folder} is no site folder yet: run 'fedml site join TOKEN --dir {folder}'",
    )
