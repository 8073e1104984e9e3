"""Finds out what a folder is, and has it looked at."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from fedml.doctor.coordinator import examine_coordinator, examine_profile
from fedml.doctor.finding import Finding
from fedml.doctor.site import examine_site
from fedml.errors import ConfigError


async def examine(folder: Path, clock: Callable[[], float] = time.time) -> list[Finding]:
    """Return what is to be said of a site's or coordinator's folder, or an operator's profile.

    Nothing is written. `clock` is this machine's, in seconds since the epoch. Raises
    `ConfigError` if the folder is none of these.
    """
    if (folder / "coordinator.toml").exists():
        return await examine_coordinator(folder, clock)
    if (folder / "site.toml").exists():
        return await examine_site(folder, clock)
    if (folder / "identity.json").exists():
        return await examine_profile(folder, clock)
    if (folder / "identity").is_dir():
        raise ConfigError(
            f"{folder}: joining broke off; run 'fedml site join' again with the same token"
        )
    raise ConfigError(
        f"{folder} is no site's folder, no coordinator's, and no operator's profile; name one"
    )
