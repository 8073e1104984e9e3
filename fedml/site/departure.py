"""How a site leaves: its word is noted in its folder first, then the coordinator is told.

From then on the daemon does not start on that folder. Everything else stays, the ledger above
all: what rows have spent they have spent, in this federation and in the next.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from fedml import durable
from fedml.errors import ConfigError, Corrupt, PermissionDenied
from fedml.records import from_record
from fedml.site.settings import Settings
from fedml.transport.link import Link

_MARK = "left.json"


@dataclass(frozen=True)
class Departure:
    """That a site has left, when, and whether its coordinator knows."""

    name: str
    coordinator: str
    when: float
    told: bool

    def __str__(self) -> str:
        day = datetime.fromtimestamp(self.when, UTC).strftime("%Y-%m-%d")
        known = "" if self.told else ", which has not been told yet"
        return f"{self.name} left {self.coordinator} on {day}{known}"


def departure(folder: Path) -> Departure | None:
    """Return how the site in `folder` left, None if it has not."""
    path = folder / _MARK
    if not path.exists():
        return None
    try:
        return from_record(Departure, durable.read_json(path), _MARK)
    except ConfigError as error:
        raise Corrupt(f"{path} is damaged ({error}); run 'fedml site leave' again") from error


def check_member(folder: Path) -> None:
    """Raise `ConfigError` if the site in `folder` has left."""
    if gone := departure(folder):
        raise ConfigError(
            f"{gone}; to come back, ask for a token and run 'fedml site join TOKEN --dir {folder}'"
        )


async def leave(folder: Path, settings: Settings, link: Link, now: float) -> Departure:
    """Leave for good: the coordinator refuses this site's certificates from now on.

    Raises `Unreachable` or `Untrusted` if the coordinator cannot be told; the folder is marked
    all the same, and the same call tells it later.
    """
    mark = Departure(settings.name, settings.coordinator, now, told=False)
    _keep(folder, mark)
    with suppress(PermissionDenied):  # revoked or expired: it lets us in no more as it is
        await link.leave()
    told = replace(mark, told=True)
    _keep(folder, told)
    return told


def come_back(folder: Path) -> None:
    """Take the mark away, once the site has joined again."""
    (folder / _MARK).unlink(missing_ok=True)


def _keep(folder: Path, mark: Departure) -> None:
    durable.replace(folder / _MARK, durable.dump_json(asdict(mark)))
