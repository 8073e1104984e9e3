"""The doctor looks at a coordinator's folder, and at an operator's profile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fedml import durable
from fedml.coordinator.settings import PARENT, RELEASES, Settings, is_region, read_settings
from fedml.doctor import books, machine, papers
from fedml.doctor.finding import Finding, attempt, is_sound
from fedml.doctor.line import line
from fedml.errors import ConfigError, FedmlError
from fedml.identity.certificates import Credentials

_FILES = 3500  # for a thousand sites
_LOGS = ("journal.jsonl", "audit.jsonl", "enrolment/tokens.jsonl", "enrolment/revoked.jsonl")
_RENEWAL = "renew it: fedml operator renew"
_REGION = "the region renews it by itself: run it, and see that it reaches its parent"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


async def examine_coordinator(folder: Path, clock: Callable[[], float]) -> list[Finding]:
    """Return all findings about a coordinator."""
    who, now = durable.holder(folder), clock()
    start = f"start it: fedml coordinator run {folder}"
    region = is_region(folder)
    releases = folder / (RELEASES if region else "releases")
    findings = [
        *attempt("program", lambda: machine.holder(folder, start)),
        *papers.authority(folder / "ca", now),
        *papers.releases(releases, now, running=bool(who), mirrored=region),
        *papers.private(*_secrets(folder)),
        *attempt("settings", lambda: _ports(read_settings(folder), who)),
        *attempt("files", lambda: machine.files(_FILES, who)),
        *attempt("packages", lambda: machine.packages("coordinator")),
        *attempt("disk", lambda: machine.disk(folder, _need(folder))),
        *_books(folder, now),
    ]
    if region:
        findings += papers.credentials(Credentials.load(folder / PARENT), now, renewal=_REGION)
    if who and (folder / "operator" / "identity.json").exists():
        findings += await examine_profile(folder / "operator", clock)
    return findings


async def examine_profile(folder: Path, clock: Callable[[], float]) -> list[Finding]:
    """Return all findings about an operator's profile."""
    try:
        own = Credentials.load(folder)
    except (FedmlError, OSError) as error:
        return [Finding.of("certificate", error)]
    looked = papers.credentials(own, clock(), renewal=_RENEWAL)
    return [
        *looked,
        *papers.private(folder / "identity.json"),
        *await line(own, clock, sound=is_sound(looked)),
    ]


def _secrets(folder: Path) -> list[Path]:
    keys = (folder / "releases" / "keys").glob("*.pem")
    seal = folder / "ca" / "receipts.json"
    more = [path for path in (seal, folder / PARENT / "identity.json") if path.exists()]
    return [folder / "ca" / "ca.json", *sorted(keys), *more]


def _ports(settings: Settings, who: str) -> list[Finding]:
    ports = {
        "sites and operators": (settings.bind, settings.port),
        "newcomers": (settings.bind, settings.enrolment_port),
        "health": (settings.health_bind, settings.health_port),
    }
    found = [machine.port(name, host, port, who) for name, (host, port) in ports.items()]
    if settings.bind in _LOOPBACK and settings.host not in _LOOPBACK:
        text = f"bind = {settings.bind!r}: other machines do not reach {settings.host} here"
        advice = 'write bind = "0.0.0.0" in coordinator.toml, unless a proxy passes TLS on'
        found.append(Finding("warn", "bind", text, advice))
    return found


def _need(folder: Path) -> float:
    """Return the bytes of a round: the model, the next one, and an update of each site asked."""
    records = durable.read_log(folder / "journal.jsonl") if _journal(folder) else []
    opened = [_entry(record).get("opened") for record in records]
    asked = [len(round_["asked"]) for round_ in opened if isinstance(round_, Mapping)]
    model = machine.largest([folder / "states", folder / "releases"])
    return float(model * (2 + max(asked, default=0)))


def _journal(folder: Path) -> bool:
    return (folder / "journal.jsonl").exists()


def _books(folder: Path, now: float) -> list[Finding]:
    findings: list[Finding] = []
    for name in _LOGS:

        def look(path: Path = folder / name) -> list[Finding]:
            found, records = books.log(path)
            key = {"audit.jsonl": "when"}.get(path.name, "")
            return [found, *(books.latest(records, key, now) if key else [])]

        findings += attempt(Path(name).name, look)
    if _journal(folder):
        findings += attempt("states", lambda: _states(folder))
    return findings


def _states(folder: Path) -> Finding:
    """Look at whether the model of each run that is under way is there."""
    last: dict[str, str] = {}
    for record in durable.read_log(folder / "journal.jsonl"):
        entry, run = _entry(record), str(_entry(record).get("run"))
        if record.get("kind") == "RoundCommitted" and entry.get("state"):
            last[run] = str(entry["state"])
        elif record.get("kind") == "Ended":
            last.pop(run, None)
    if lost := [name for name in last.values() if not (folder / "states" / name).exists()]:
        advice = "restore the folder whole, from one backup"
        return Finding("fail", "states", f"{', '.join(lost)} of the journal are gone", advice)
    return Finding("ok", "states", f"{len(last)} runs under way, each with its model")


def _entry(record: durable.Record) -> Mapping[str, object]:
    entry = record.get("entry")
    if not isinstance(entry, Mapping):
        raise ConfigError("a record of the journal is none of ours; use the fedml that wrote it")
    return entry
