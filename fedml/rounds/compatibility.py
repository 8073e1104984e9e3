"""What goes with what: each algorithm under each mode, asked of the plan that would refuse it.

Nothing here knows an answer: a cell is whether a `Plan` can be built, and its reasons are the
plan's own. The page of algorithms shows `table()`, and a test holds it to that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from fedml.errors import Contradiction
from fedml.protocol.messages import Privacy, RecipeId, Training
from fedml.protocol.secagg import Secagg
from fedml.rounds.plan import Cohort, Evaluation, Plan
from fedml.secagg.terms import LEAST_COHORT
from fedml.strategies import FedAvg, Reducer, Strategy, buffering_of, in_turn, one_by_one

_RECORD = Privacy("record", epsilon=1.0, delta=1e-5)
_SHARED = replace(_RECORD, mode="record_distributed", sharers=LEAST_COHORT)
_SETTINGS: Mapping[str, tuple[Privacy, Secagg]] = {
    "none": (Privacy(), Secagg()),
    "record": (_RECORD, Secagg()),
    "patient": (replace(_RECORD, mode="patient"), Secagg()),
    "site_central": (replace(_RECORD, mode="site_central"), Secagg()),
    "record_distributed": (_SHARED, Secagg("sa1")),  # as real sites take part in it
    "site_distributed": (replace(_SHARED, mode="site_distributed"), Secagg("sa1")),
    "secagg": (Privacy(), Secagg("sa1")),
    "vectorised": (Privacy(), Secagg()),
}
MODES = tuple(_SETTINGS)  # of privacy, masked sums, and a simulation of all sites at once


def trial(strategy: Strategy, mode: str) -> Plan:
    """Return the plainest plan of `strategy` under `mode`; raises `Contradiction` if none is."""
    privacy, secagg = _SETTINGS[mode]
    alone = in_turn(strategy)
    quorum = 1 if alone else max(LEAST_COHORT, strategy.reducer.least)
    if (buffering := buffering_of(strategy)) and buffering.size:
        quorum = min(quorum, buffering.size)
    return Plan(
        model="any",
        recipe=RecipeId("any", "00" * 32),
        dataset="any",
        strategy=strategy,
        training=Training(lr=1.0, steps=1),
        cohort=Cohort(quorum=quorum, deadline=60.0, size=int(alone)),
        rounds=1,
        privacy=privacy,
        secagg=secagg,
        evaluation=Evaluation(at_end=False),
    )


def objections(strategy: Strategy, mode: str) -> tuple[str, ...]:
    """Return why `strategy` does not go with `mode`, each with the way out; none if it does.

    Vectorised, it runs all the same, but its sites one by one.
    """
    try:
        trial(strategy, mode)
    except Contradiction as error:
        return error.reasons
    why = one_by_one(strategy) if mode == "vectorised" else ""
    return (f"{why}: sites are trained one by one, the slower way",) if why else ()


def table(strategies: Mapping[str, Strategy], reducers: Mapping[str, Reducer]) -> str:
    """Return the table of all these under every mode in Markdown, with its reasons below.

    A reducer is tried with FedAvg.
    """
    reasons: dict[str, int] = {}
    lines = [
        f"| | {' | '.join(f'`{mode}`' for mode in MODES)} |",
        f"|---|{'---|' * len(MODES)}",
    ]
    for name, strategy in strategies.items():
        lines.append(f"| `{name}` | {' | '.join(_cells(strategy, reasons))} |")
    for name, reducer in reducers.items():
        cells = _cells(FedAvg(reducer=reducer), reasons)
        lines.append(f"| `{name.replace('-', '_')}` | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines)


def _cells(strategy: Strategy, reasons: dict[str, int]) -> Iterator[str]:
    """Yield a cell for each mode, and number the reasons that are new."""
    for mode in MODES:
        why = objections(strategy, mode)
        for part in (strategy, strategy.reducer):  # one reason for all whom it is about
            why = tuple(reason.replace(type(part).__name__, "…") for reason in why)
        numbers = ", ".join(str(reasons.setdefault(r, len(reasons) + 1)) for r in why)
        word = "one by one" if mode == "vectorised" else "no"
        yield f"{word} ({numbers})" if why else "yes"
