"""What the doctor finds: one line a look, with what to do where something is amiss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from fedml.errors import FedmlError

DAY = 86_400.0
State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, what is there, and what to do about it; nothing to do is ""."""

    state: State
    what: str
    found: str
    advice: str = ""

    @classmethod
    def of(cls, what: str, error: Exception) -> Finding:
        """Return an error as a finding; our own lines end with the way out, after a semicolon."""
        if isinstance(error, OSError) and error.filename:
            text, advice = f"{error.filename}: {error.strerror}", "mend the path or the rights"
        else:
            text, _, advice = str(error).partition("; ")
        return cls("fail", what, text, advice)


Look = Callable[[], Finding | Iterable[Finding]]


def attempt(what: str, look: Look) -> list[Finding]:
    """Return what `look` finds; what it could not look at is a finding as well."""
    try:
        found = look()
        return [found] if isinstance(found, Finding) else list(found)
    except (FedmlError, OSError) as error:
        return [Finding.of(what, error)]


def is_sound(findings: Iterable[Finding]) -> bool:
    """Whether none of `findings` is a failure."""
    return all(finding.state != "fail" for finding in findings)


def days(seconds: float) -> str:
    """Return a time to come as people say it."""
    return f"{seconds / DAY:.0f} days" if seconds >= 2 * DAY else f"{seconds / 3600:.0f} hours"


def size(count: float) -> str:
    """Return a number of bytes as people say it."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
