"""A coordinator says who counted for little in five rounds in a row, once, also over a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedml.cli import receipts
from fedml.protocol.messages import SiteId
from fedml.rounds import Cohort
from fedml.strategies import FedAvg
from fedml.strategies.robust import MultiKrum
from fedml.telemetry import ALERTS
from tests.coordinator.world import Hub, Site, delta, hub, packed, plan

SITES = ("bern", "kyoto", "lima", "oslo", "quito")
LIAR = "kyoto"


async def play(a_hub: Hub, folder: Path, rounds: int, *kept: Site) -> None:
    sites = kept or [await Site(folder, name).connect(a_hub) for name in SITES]
    for _ in range(rounds):
        for site in sites:
            order = await site.order()
            value = -1e3 if site.name == LIAR else 1.0 + order.round / 10 + ord(site.name[0]) / 1e3
            await site.answer(order, packed({"delta": delta(value)}))


async def test_a_site_damped_in_five_rounds_in_a_row_raises_an_alert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a_plan = plan(
        rounds=6,
        strategy=FedAvg(reducer=MultiKrum(f=1)),
        cohort=Cohort(quorum=5, deadline=60.0, sites=tuple(map(SiteId, SITES))),
    )
    alert = f"{LIAR} counted for little in 5 rounds in a row, last because "
    async with hub(tmp_path) as a_hub:
        run = await a_hub.submit(a_plan)
        await play(a_hub, tmp_path, 3)
        await a_hub.receipt(run, 3)
        assert not any("alert" in line for line in receipts.lines(a_hub.runs.detail(run)))
    async with hub(tmp_path) as a_hub:
        before = ALERTS.labels("damped")._value.get()
        await play(a_hub, tmp_path, 3)
        assert (await a_hub.end(run)).state == "done"
        last = list(receipts.lines(a_hub.runs.detail(run)))[-1]
    assert ALERTS.labels("damped")._value.get() == before + 1
    assert last.startswith(f"alert: {alert.replace('5', '6')}0% of an even share: ")
    told = [line for line in capsys.readouterr().out.splitlines() if "[warning  ] alert" in line]
    assert len(told) == 1 and alert in told[0]
