"""Every error fedml raises, grouped by what the caller can do about it.

FedmlError
├── ConfigError          a setting, file or argument must change; retrying is useless
│   ├── UnknownModel     no such model or version is served here
│   └── Contradiction    several settings disagree; the message lists every reason
├── Refused              someone's policy said no; retrying is useless
│   ├── PermissionDenied
│   ├── BudgetExhausted
│   └── Busy             for now only: asking again later is right
├── Unreachable          the network or the peer; retrying is right
│   ├── Overloaded       too much is waiting already; retry a little later
│   └── NoRoom           a disk of ours is full; retry once there is room
├── Untrusted            a check failed; drop the data and alarm
│   ├── MalformedMessage
│   │   └── MalformedUpdate
│   └── Corrupt          a file of ours is not what we wrote; restore it from a backup
├── TaskFailed           the work itself broke (crash, out of memory, time limit)
└── RoundFailed          this round is over, the run may go on
    └── QuorumLost
"""

from __future__ import annotations

from collections.abc import Sequence


class FedmlError(Exception):
    """Base of all errors that fedml raises on purpose; its text is one line for a person."""


class ConfigError(FedmlError):
    """A setting, a file or an argument is missing or wrong; the text says how to mend it."""


class UnknownModel(ConfigError):
    """The request names a model or a version that is not served here."""


class Contradiction(ConfigError):
    """Settings that cannot hold together; `reasons` has one sentence for each conflict."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = tuple(reasons)


class Refused(FedmlError):
    """A policy, of the coordinator or of a site, forbids the request."""


class PermissionDenied(Refused):
    """The caller's role or certificate does not allow the action."""


class BudgetExhausted(Refused):
    """The next charge would exceed a site's privacy budget; nothing was charged."""

    def __init__(self, what: str, spent: float, asked: float, limit: float, key: str) -> None:
        """Refuse `what`; `key` is the policy's line that sets the limit."""
        super().__init__(
            f"{what}: epsilon {spent:.3f} spent, {asked:.3f} after this task, limit {limit:.3f}; "
            f"raise policy {key} or stop the run"
        )
        self.what, self.spent, self.asked, self.limit = what, spent, asked, limit


class Busy(Refused):
    """A policy says no for now: as much is under way as it allows; later may be right."""


class Unreachable(FedmlError):
    """The peer did not answer; the call may be repeated."""


class Overloaded(Unreachable):
    """As many requests wait as may wait; nothing was done, the same one may come again."""


class NoRoom(Unreachable):
    """A disk is full: nothing was written, and the same call is right once there is room."""


class Untrusted(FedmlError):
    """A signature, digest or shape check failed; the data was dropped."""


class OtherVersion(Untrusted):
    """The peer does not know what was asked, for it is older or speaks another major version."""


class MalformedMessage(Untrusted):
    """Bytes that do not decode to a message within the protocol's limits."""


class MalformedUpdate(MalformedMessage):
    """An update does not fit the model it claims to change."""


class Corrupt(Untrusted):
    """A file of our own is damaged in a way that no crash of ours can explain."""


class TaskFailed(FedmlError):
    """A site's work on a task broke: it crashed, ran out of memory or out of time."""


class RoundFailed(FedmlError):
    """A round ended without a new model version."""


class QuorumLost(RoundFailed):
    """Too few sites answered before the deadline."""
