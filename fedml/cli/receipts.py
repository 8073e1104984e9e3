"""A run's receipts for people: who was asked in each round, who counted, who did not and why."""

from __future__ import annotations

from collections.abc import Iterator

from fedml.cli.console import scores
from fedml.protocol.operations import Receipt, RunDetail, round_of
from fedml.rounds.vigil import Vigil


def lines(detail: RunDetail) -> Iterator[str]:
    """Yield a line for each round, and below it one for each site; at the end the alerts."""
    for receipt in detail.receipts:
        yield _round(receipt)
        counted = (one.site for one in receipt.counted)
        sites = [*counted, *receipt.missing, *receipt.carried, *receipt.left_out]
        width = max(map(len, sites), default=0)
        for one in receipt.counted:
            name = "reply" if receipt.about else "update"
            update = f"  {name} {one.digest[:12]}" if one.digest else ""
            spent = f"  epsilon {one.epsilon:.3f}" if one.epsilon else ""
            weight = "" if receipt.about else f"  weight {one.weight:g}"
            late = receipt.staleness(one.site)
            aged = f"  {late} round{'s' * (late > 1)} late" if late else ""
            yield f"  counted    {one.site:{width}}{weight}{update}{spent}{aged}"
        for site, why in receipt.missing.items():
            yield f"  missing    {site:{width}}  {why}"
        for site, task in receipt.carried.items():
            yield f"  works on   {site:{width}}  round {round_of(receipt.run, task)}"
        for site, why in receipt.damped.items():
            yield f"  damped     {site:{width}}  {why}"
        for site, why in receipt.left_out.items():
            yield f"  not asked  {site:{width}}  {why}"
    for alert in Vigil(detail.receipts).alerts():
        yield f"alert: {alert}"


def _round(receipt: Receipt) -> str:
    if receipt.about:
        asked = ", ".join(receipt.asked)
        return f"exchange {receipt.round} ({receipt.about}): asked {asked}; {receipt.model[:12]}"
    what = "round" if receipt.kind == "train" else "scores after round"
    again = f", attempt {receipt.attempt}" if receipt.attempt > 1 else ""
    came = f"model {receipt.model[:12]}" if receipt.model else "failed"
    numbers = scores({**receipt.metrics, **receipt.scores}.items())
    head = f"{what} {receipt.round}{again}: asked {', '.join(receipt.asked)}; {came}"
    return f"{head}; {numbers}" if numbers else head
