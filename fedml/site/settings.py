"""What a site is: its name, its coordinator and its ports, in `site.toml`; and where its files lie."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedml.errors import ConfigError
from fedml.protocol.messages import check_name


@dataclass(frozen=True)
class Settings:
    """A site's own settings. Ports are those of its inference endpoint; 0 takes a free one."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    coordinator: str  # host:port
    serve_host: str = "127.0.0.1"
    rest_port: int = 8400
    grpc_port: int = 8401

    def __post_init__(self) -> None:
        check_name("site", self.name)
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"coordinator {self.coordinator!r}: write host:port")
        for port_number in (self.rest_port, self.grpc_port):
            if not 0 <= port_number < 65536:
                raise ConfigError(f"port {port_number}: must be 0 to 65535")

    def to_toml(self) -> str:
        """Return the text of `site.toml`."""
        values = {
            "name": self.name,
            "coordinator": self.coordinator,
            "serve_host": self.serve_host,
            "rest_port": self.rest_port,
            "grpc_port": self.grpc_port,
        }
        return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def read_settings(folder: Path) -> Settings:
    """Read `site.toml` in a site's folder; raises `ConfigError` with every wrong key."""
    path = folder / "site.toml"
    try:
        raw = tomllib.loads(path.read_text())
        return TypeAdapter(Settings).validate_json(json.dumps(raw, default=str), strict=True)
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder} is no site folder (no site.toml); run 'fedml site join TOKEN --dir {folder}'"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        lines = [f"{d['loc'][0]} = {d['input']!r:.60}: {d['msg']}" for d in error.errors()]
        raise ConfigError(f"{path}: {'; '.join(lines)}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
