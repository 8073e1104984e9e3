"""Every instrument fedml has, in one list, and how its programs log.

Metrics are Prometheus; a site serves its own at `/metrics` beside its predictions. Logs are one
structured line an event on standard error: for people on a terminal, JSON elsewhere.
"""

from __future__ import annotations

import logging
import sys

import structlog
from prometheus_client import Counter, Gauge, Histogram

ROUNDS = Counter("fedml_rounds_total", "Rounds that ended", ["outcome"])
ALERTS = Counter("fedml_alerts_total", "Alerts raised or renewed", ["kind"])
TASKS = Counter("fedml_tasks_total", "Tasks that ended at this site", ["outcome"])
SITES = Gauge("fedml_sites_connected", "Sites with an open stream")
EPSILON = Gauge("fedml_epsilon_spent", "Epsilon spent, by dataset, of the lifetime", ["dataset"])
BYTES = Counter("fedml_blob_bytes_total", "Blob bytes moved", ["direction"])
PREDICTIONS = Counter("fedml_predictions_total", "Rows predicted", ["model", "version"])
LATENCY = Histogram(
    "fedml_inference_seconds",
    "Time from request to answer",
    ["model"],
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0),
)
RELEASES = Counter("fedml_releases_total", "Releases a site met", ["outcome"])


def configure_logging(*, verbose: bool = False) -> None:
    """Log to standard error: coloured lines on a terminal, one JSON object a line elsewhere."""
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.DEBUG if verbose else logging.INFO
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
