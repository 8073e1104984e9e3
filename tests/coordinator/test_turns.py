"""Whose turn it is at sites that take part in few runs at once: pure, so without a coordinator."""

from __future__ import annotations

from dataclasses import replace

from fedml.coordinator.turns import Turns
from fedml.learning.recipe import identify
from fedml.protocol.messages import DatasetCard, RunId, SiteId
from fedml.rounds import Cohort, SitesChanged, SiteStatus
from fedml.rounds.hosting import Opened
from fedml.rounds.run import Run
from tests.coordinator.world import first_params, plan

SITES = tuple(map(SiteId, ("bern", "kyoto", "quito", "zug")))
CARD = DatasetCard("records", 10, "ab" * 32)


def here(*names: str, at_once: int = 1) -> tuple[SiteStatus, ...]:
    sites = names or SITES
    recipe = identify("breast_cancer")
    return tuple(SiteStatus(SiteId(s), True, (recipe,), (CARD,), at_once) for s in sorted(sites))


def run(name: str, quorum: int, *sites: str, size: int = 0) -> Run:
    cohort = Cohort(quorum=quorum, size=size, deadline=60.0, sites=tuple(map(SiteId, sites)))
    return Run.begin(RunId(name), plan(cohort=cohort), first_params())


class Hall:
    """Runs that look and sit down as hosts do; none ever gets an answer."""

    def __init__(self) -> None:
        self.turns, self.statuses = Turns(), here()

    def look(self, a_run: Run) -> bool:
        """Let a run look; return whether it sits down."""
        pool = SitesChanged(self.turns.pool(a_run, self.statuses))
        opened = [c for c in a_run.handle(pool, 0.0) if isinstance(c, Opened)]
        for command in opened:
            self.turns.take(a_run.id, command.opening.asked)
        return bool(opened)

    def rise(self, a_run: Run) -> None:
        """Let a run's round be over, with all that it held."""
        a_run._round = None
        self.turns.keep(a_run.id, ())


def test_a_run_that_needs_many_sites_does_not_wait_for_ever_behind_runs_that_need_few() -> None:
    hall = Hall()
    left, right = run("left", 2, "bern", "kyoto"), run("right", 2, "quito", "zug")
    whole = run("whole", 4, *SITES)
    assert hall.look(left)
    assert hall.look(right)
    assert not hall.look(whole)
    hall.rise(left)
    assert not hall.look(left)  # two sites are free, and kept for the run that is first in line
    assert not hall.look(whole)
    hall.rise(right)
    assert not hall.look(right)
    assert hall.look(whole)


def test_what_the_first_in_line_cannot_use_goes_to_those_behind_it() -> None:
    hall = Hall()
    hall.statuses = here("bern", "kyoto", "quito")
    busy, first, second = run("busy", 1, "bern"), run("first", 2, "bern", "kyoto"), run("second", 1)
    assert hall.look(busy)
    assert not hall.look(first)
    assert hall.look(second)
    assert second.asked == ("quito",)


def test_who_is_not_first_in_line_keeps_nothing_that_is_too_little_for_it() -> None:
    hall = Hall()
    busy, first = run("busy", 1, "bern"), run("first", 2, "bern", "kyoto")
    second, third = run("second", 2, "bern", "quito"), run("third", 1, "quito")
    assert hall.look(busy)
    assert not hall.look(first)
    assert not hall.look(second)
    assert hall.look(third)


def test_others_hear_of_what_was_kept_for_a_run_that_waits_no_longer() -> None:
    hall = Hall()
    busy, first, second = (
        run("busy", 1, "bern"),
        run("first", 2, "bern", "kyoto"),
        run("2nd", 1, "kyoto"),
    )
    assert hall.look(busy)
    assert not hall.look(first)
    assert not hall.look(second)
    hall.statuses = here("kyoto")  # bern is gone, so the first could not start anyway
    assert not hall.look(first)
    assert hall.turns.yields(first.id)
    assert not hall.turns.yields(first.id)  # said once
    assert hall.look(second)


def test_others_hear_of_what_was_kept_and_not_drawn() -> None:
    hall = Hall()
    busy, draws, other = run("busy", 4), run("draws", 1, size=1), run("other", 1)
    assert hall.look(busy)
    assert not hall.look(draws)
    assert not hall.look(other)
    hall.rise(busy)
    assert hall.look(draws)
    assert hall.turns.yields(draws.id)
    assert hall.look(other)


def test_a_seat_is_given_up_only_when_its_site_knows_that_the_round_is_over() -> None:
    hall = Hall()
    first, second = run("first", 2, "bern", "kyoto"), run("second", 1, "bern")
    assert hall.look(first)
    assert not hall.look(second)
    hall.turns.take(first.id, (SiteId("quito"),))  # its next round opens as this one is committed
    assert not hall.look(second)
    hall.turns.keep(first.id, (SiteId("quito"),))
    assert hall.turns.yields(first.id)
    assert hall.look(second)


def test_a_run_that_is_over_keeps_nobody_waiting() -> None:
    hall = Hall()
    busy, gone, second = (
        run("busy", 1, "bern"),
        run("gone", 2, "bern", "kyoto"),
        run("2nd", 1, "kyoto"),
    )
    assert hall.look(busy)
    assert not hall.look(gone)
    assert not hall.look(second)
    hall.turns.leave(gone.id)
    assert hall.look(second)


def test_sites_without_a_limit_are_everybody_s() -> None:
    hall = Hall()
    hall.statuses = tuple(replace(status, runs_at_once=0) for status in here())
    assert all(hall.look(run(name, 4)) for name in ("a", "b", "c"))
