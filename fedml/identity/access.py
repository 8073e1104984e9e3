"""What a caller may do: a table of roles and methods, default deny, and the revoked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fedml.durable import Log, Record
from fedml.errors import PermissionDenied
from fedml.identity.certificates import Identity, check_in_time
from fedml.protocol.messages import check_name
from fedml.protocol.operations import Role

_READ = frozenset(
    f"Operations/{name}"
    for name in ("ListRuns", "ShowRun", "WatchRun", "ListModels", "ShowModel", "ListSites")
)
_CHANGE = frozenset(
    f"Operations/{name}"
    for name in ("Submit", "StopRun", "ResumeRun", "Release", "Rollback", "Invite", "Revoke")
)
_FEDERATE = frozenset(
    f"Federation/{name}" for name in ("Connect", "Download", "Upload", "Fetch", "Leave")
)
_ANYONE = frozenset({"Federation/Renew", "Federation/Ping"})

ALLOWED: Mapping[Role, frozenset[str]] = {
    "site": _FEDERATE | _ANYONE,
    "region": _FEDERATE | _ANYONE,
    "operator": _READ | _CHANGE | _ANYONE,
    "viewer": _READ | _ANYONE,
}


class Revocations:
    """Names and serial numbers that are refused, kept in one durable log.

    A revoked name is refused with every certificate issued up to then; one issued later, after a
    new invitation, is good. A revoked serial number is refused for ever.
    """

    def __init__(self, path: Path) -> None:
        self._log = Log(path)
        self._names: dict[str, float] = {}
        self._serials: set[int] = set()
        for record in self._log.records:
            self._apply(record)

    def revoke(self, name: str, now: float, *, serial: int | None = None) -> None:
        """Refuse from now on all certificates of `name` issued by `now`, or only one of them."""
        check_name("name", name)
        record = {"name": name, "when": now, "serial": None if serial is None else str(serial)}
        self._log.append(record)
        self._apply(record)

    def check(self, identity: Identity) -> None:
        """Raise `PermissionDenied` if the certificate behind `identity` was revoked."""
        revoked = self._names.get(identity.name)
        # `<=` errs on the safe side: certificates count in whole seconds
        if identity.serial in self._serials or (revoked is not None and identity.issued <= revoked):
            raise PermissionDenied(
                f"the certificate of {identity} was revoked; join with a new token"
            )

    def _apply(self, record: Record) -> None:
        if record["serial"] is None:
            self._names[record["name"]] = max(
                float(record["when"]), self._names.get(record["name"], 0.0)
            )
        else:
            self._serials.add(int(record["serial"]))


class Access:
    """Whether a caller may call a method, asked at every call."""

    def __init__(self, revocations: Revocations) -> None:
        self._revocations = revocations

    def check(self, identity: Identity, method: str, now: float) -> None:
        """Raise `PermissionDenied`, naming role and method, unless the table says yes.

        `method` is the service and its method, as `Operations/Submit`.
        """
        check_in_time(identity, now)
        self._revocations.check(identity)
        if method not in ALLOWED.get(identity.role, frozenset()):
            wanted = [role for role, methods in ALLOWED.items() if method in methods]
            raise PermissionDenied(
                f"{identity}: role {identity.role!r} may not call {method}"
                + (f"; it takes role {' or '.join(wanted)}" if wanted else "")
            )
