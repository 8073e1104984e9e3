"""How fast a site answers, and how much: for the operator now, for Prometheus over time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fedml.telemetry import LATENCY, PREDICTIONS

WINDOW = 2048  # requests


@dataclass(frozen=True)
class Pace:
    """A model's last requests, at most `WINDOW`: seconds from request to answer."""

    requests: int  # since the start
    rows: int
    p50: float
    p99: float


class _Seen:
    def __init__(self) -> None:
        self.requests = self.rows = 0
        self.seconds: deque[float] = deque(maxlen=WINDOW)


class Watch:
    """Counts answers. Lives on one event loop."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def record(self, model: str, version: str, rows: int, seconds: float) -> None:
        """Note one answered request."""
        seen = self._seen.setdefault(model, _Seen())
        seen.requests += 1
        seen.rows += rows
        seen.seconds.append(seconds)
        PREDICTIONS.labels(model, version).inc(rows)
        LATENCY.labels(model).observe(seconds)

    def pace(self, model: str) -> Pace:
        """Return how a model has been doing; all zeros before its first answer."""
        seen = self._seen.get(model)
        if seen is None:
            return Pace(0, 0, 0.0, 0.0)
        ordered = sorted(seen.seconds)
        last = len(ordered) - 1
        return Pace(
            seen.requests, seen.rows, ordered[round(last * 0.5)], ordered[round(last * 0.99)]
        )
