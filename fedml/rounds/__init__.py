"""A run's life with no network and no clock: events in, commands out."""

from fedml.rounds.hosting import (
    Candidate,
    Command,
    Commit,
    Committed,
    End,
    Event,
    ForgetTask,
    Opened,
    SitesChanged,
    StopAsked,
    Tick,
)
from fedml.rounds.masked import MaskedRound, Relay, Said, terms_of
from fedml.rounds.plan import Cohort, Evaluation, Gate, Plan
from fedml.rounds.round import (
    CancelTask,
    Opening,
    ReportArrived,
    Round,
    SendTask,
    SiteLost,
    StackArrived,
    UpdateArrived,
    WakeAt,
)
from fedml.rounds.run import Run
from fedml.rounds.selection import Muster, Pool, Roll, Selection, SiteStatus, draw, eligible

__all__ = [
    "CancelTask",
    "Candidate",
    "Cohort",
    "Command",
    "Commit",
    "Committed",
    "End",
    "Evaluation",
    "Event",
    "ForgetTask",
    "Gate",
    "MaskedRound",
    "Muster",
    "Opened",
    "Opening",
    "Plan",
    "Pool",
    "Relay",
    "ReportArrived",
    "Roll",
    "Round",
    "Run",
    "Said",
    "Selection",
    "SendTask",
    "SiteLost",
    "SiteStatus",
    "SitesChanged",
    "StackArrived",
    "StopAsked",
    "Tick",
    "UpdateArrived",
    "WakeAt",
    "draw",
    "eligible",
    "terms_of",
]
