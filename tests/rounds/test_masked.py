"""A masked round comes to the plain one's mean, and ends once, whoever falls out and when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml.errors import QuorumLost, RoundFailed
from fedml.params import Params
from fedml.protocol.messages import SiteId, Summand, TaskId
from fedml.protocol.secagg import Masked, Secagg
from fedml.protocol.tasks import Brief, Report, Sum, Update
from fedml.rounds import (
    MaskedRound,
    Opening,
    Relay,
    Round,
    Said,
    SiteLost,
    SumArrived,
    UpdateArrived,
    WakeAt,
)
from fedml.rounds.masked import Command, Event, terms_of
from fedml.rounds.round import CancelTask, Close, DeadlinePassed, Fail, SendTask
from fedml.simulation.veil import Veil
from fedml.strategies import Aggregate, WeightedMean, number, reports
from tests.rounds.worlds import RUN

SITES = tuple(SiteId(name) for name in ("bern", "kyoto", "lima", "oslo", "quito"))
BERN = SITES[0]
MODEL = Params(
    {
        "w": torch.zeros(30),
        "double": torch.zeros(4, dtype=torch.float64),
        "half": torch.zeros(5, dtype=torch.bfloat16),
        "count": torch.zeros(2, dtype=torch.int64),
    }
)
SA1 = Secagg("sa1", clip=0.5, weight_cap=100.0, metrics={"loss": 10.0}, scores=("accuracy",))
OPENING = Opening(RUN, 1, 1, SITES, quorum=3, deadline=60.0)
PLAIN = Brief(MODEL)


def brief_of(rule: str) -> Brief:
    if rule == "scaffold":
        return Brief(MODEL, rule, slots={"control": MODEL})
    return Brief(MODEL, rule)


def values(seed: int) -> Params:
    draw = torch.Generator().manual_seed(seed)
    floats = {
        name: torch.rand(t.shape, generator=draw, dtype=torch.float64).sub(0.5).to(t.dtype)
        for name, t in MODEL.items()
        if t.dtype.is_floating_point
    }
    return Params({**floats, "count": torch.full((2,), 3)})


def update(site: SiteId, brief: Brief, opening: Opening = OPENING) -> Update:
    place = SITES.index(site)
    slots = {
        name: number(5.0 + place) if brief.rule == "fednova" else values(100 + place)
        for name in reports(brief)
    }
    metrics = {"loss": 1.0 + place, "unasked": 7.0} if place else {}
    task = opening.task_id(site)
    return Update(task, 1, site, values(place), 10.0 + 7 * place, slots, metrics)


class World:
    """A masked round with its sites; `gone` have stopped for good."""

    def __init__(self, brief: Brief = PLAIN, opening: Opening = OPENING, enough: int = 0) -> None:
        self.brief, self.opening = brief, opening
        self.veil = Veil(SA1, opening.asked)
        self.round = MaskedRound(opening, SA1, self.veil.roster, enough=enough)
        self.log: list[Command] = []
        self.gone: set[SiteId] = set()
        self.inbox: list[Relay] = []
        self.veil.open(opening)

    def start(self) -> World:
        commands = self.round.open(self.brief)
        self.carry([*commands])
        for command in commands:
            if isinstance(command, SendTask) and command.task.site not in self.gone:
                self.feed(self.veil.begin(command.task))
        return self

    def feed(self, event: Event) -> None:
        self.carry(self.round.handle(event))

    def carry(self, commands: list[Command]) -> None:
        self.log += commands
        self.inbox += [c for c in commands if isinstance(c, Relay)]

    def deliver(self) -> None:
        """Hand over what the coordinator said; sites that are gone hear nothing."""
        inbox, self.inbox = self.inbox, []
        for relay in inbox:
            if relay.site not in self.gone and (said := self.veil.hear(relay)):
                self.feed(said)

    def train(self) -> None:
        for site in self.opening.asked:
            if site not in self.gone:
                self.feed(self.veil.mask(update(site, self.brief, self.opening)))

    def time_out(self) -> None:
        """Let the deadline of the phase pass, as a host does with each `WakeAt`."""
        if self.inbox:
            return  # the phase is over already
        for command in list(self.log):
            if isinstance(command, WakeAt) and self.round.awaits(command.token):
                self.feed(DeadlinePassed())

    def play(self, losing: Mapping[int, set[SiteId]] | None = None) -> World:
        """Play all phases; who is in `losing[k]` stops before it answers in phase k."""
        losing = losing or {}
        self.gone |= losing.get(0, set())
        self.start()
        self.time_out()
        for phase in range(1, 5):
            self.gone |= losing.get(phase, set())
            self.deliver()
            if phase == 2:
                self.train()
            self.time_out()
        return self

    @property
    def end(self) -> Close | Fail:
        [end] = [c for c in self.log if isinstance(c, Close | Fail)]
        return end


def plain(brief: Brief, sites: tuple[SiteId, ...]) -> Aggregate:
    round_ = Round(replace(OPENING, asked=sites, quorum=1), WeightedMean(), reports(brief))
    round_.open(brief)
    commands = [c for s in sites for c in round_.handle(UpdateArrived(update(s, brief)))]
    [close] = [c for c in commands if isinstance(c, Close)]
    assert isinstance(close.total, Aggregate)
    return close.total


def agree(masked: Aggregate, clear: Aggregate) -> None:
    assert masked.weight == pytest.approx(clear.weight, rel=1e-12)
    assert masked.count == clear.count
    assert masked.slots.keys() == clear.slots.keys()
    pairs = [(masked.delta, clear.delta), *((s, clear.slots[n]) for n, s in masked.slots.items())]
    for mine, theirs in pairs:
        for name, tensor in mine.items():
            rounding = {torch.bfloat16: 2e-3, torch.float32: 6e-8}.get(tensor.dtype, 0.0)
            error = (tensor.double() - theirs[name].double()).abs().max()
            assert error <= 1e-8 + rounding, (name, error)
    loss = {name: value for name, value in clear.metrics.items() if name == "loss"}
    assert masked.metrics == pytest.approx({**loss, "clipped": 0.0}, abs=1e-9)


@pytest.mark.parametrize("rule", ["plain", "scaffold", "fednova"])
def test_the_masked_mean_is_the_plain_one_to_1e_8(rule: str) -> None:
    brief = brief_of(rule)
    end = World(brief).play().end
    assert isinstance(end, Close) and isinstance(end.total, Aggregate)
    agree(end.total, plain(brief, SITES))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=5, max_size=5))
def test_any_dropouts_end_in_the_survivors_mean_or_in_nothing(when: list[int]) -> None:
    losing = {
        phase: {site for site, lost in zip(SITES, when, strict=True) if lost == phase}
        for phase in range(5)
    }
    world = World().play(losing)
    end = world.end
    survivors = tuple(s for s, lost in zip(SITES, when, strict=True) if lost > 2)
    if sum(lost > 4 for lost in when) < 3:
        assert isinstance(end, Fail) and isinstance(end.error, QuorumLost)
        assert end.account.counted == ()
        return
    assert isinstance(end, Close) and isinstance(end.total, Aggregate)
    agree(end.total, plain(PLAIN, survivors))
    assert tuple(one.site for one in end.account.counted) == survivors
    assert end.account.missing.keys() == set(SITES) - set(survivors)


def test_a_receipt_has_nobody_s_weight() -> None:
    end = World().play().end
    assert {one.weight for one in end.account.counted} == {0.0}


def test_a_straggler_is_cancelled_at_the_deadline_and_the_others_go_on() -> None:
    world = World().play({2: {BERN}})
    reason = "no answer within 60 s"
    assert CancelTask(OPENING.task_id(BERN), BERN, reason) in world.log
    assert isinstance(world.end, Close)
    assert world.end.account.missing == {BERN: reason}


def keyed(enough: int) -> World:
    """A round whose sites have each other's keys, and train."""
    world = World(enough=enough).start()
    world.deliver()
    world.deliver()
    return world


def vector(world: World, site: SiteId) -> Event:
    return world.veil.mask(update(site, PLAIN))


def test_with_enough_vectors_the_slow_ones_are_called_back_and_the_sum_is_of_the_others() -> None:
    world = keyed(enough=4)
    for site in SITES[1:4]:
        world.feed(vector(world, site))
    assert not world.inbox
    assert not [c for c in world.log if isinstance(c, CancelTask)]
    world.feed(vector(world, SITES[4]))
    assert [c.site for c in world.log if isinstance(c, CancelTask)] == [BERN]
    assert {relay.site for relay in world.inbox} == {*SITES[1:]}  # told whose vectors are in it
    world.deliver()
    world.deliver()
    assert isinstance(world.end, Close) and isinstance(world.end.total, Aggregate)
    agree(world.end.total, plain(PLAIN, SITES[1:]))
    assert world.end.account.missing == {BERN: "not waited for: enough masked vectors came"}


def test_a_vector_past_enough_does_not_count_though_it_was_under_way() -> None:
    world = keyed(enough=3)
    late = [vector(world, site) for site in SITES[3:]]
    for site in SITES[:3]:
        world.feed(vector(world, site))
    for event in late:
        world.feed(event)
    assert world.round.progress == "unmasking the sum of 3 of 5 sites, 2 lost"
    world.deliver()
    world.feed(late[0])
    world.deliver()
    assert isinstance(world.end, Close) and isinstance(world.end.total, Aggregate)
    agree(world.end.total, plain(PLAIN, SITES[:3]))
    assert [one.site for one in world.end.account.counted] == [*SITES[:3]]
    assert {*world.end.account.missing} == {*SITES[3:]}


def test_no_sum_is_of_fewer_than_the_threshold_whatever_is_enough() -> None:
    world = keyed(enough=1)
    assert world.round.terms.threshold == 3
    for site in SITES[:2]:
        world.feed(vector(world, site))
    assert not world.inbox
    assert not [c for c in world.log if isinstance(c, CancelTask)]
    world.feed(vector(world, SITES[2]))
    assert {c.site for c in world.log if isinstance(c, CancelTask)} == {*SITES[3:]}


def test_keys_are_waited_for_from_all_whatever_is_enough() -> None:
    world = World(enough=3)
    world.gone = {BERN}
    world.start()
    assert not world.inbox  # one may be slow to train, not to say its keys
    world.time_out()
    assert {relay.site for relay in world.inbox} == {*SITES[1:]}


def test_a_round_that_lost_too_many_for_its_buffer_closes_with_those_left() -> None:
    world = keyed(enough=4)
    for site in SITES[:2]:
        world.feed(SiteLost(site, "away"))
    for site in SITES[2:]:
        world.feed(vector(world, site))
    world.deliver()
    world.deliver()
    assert isinstance(world.end, Close) and isinstance(world.end.total, Aggregate)
    agree(world.end.total, plain(PLAIN, SITES[2:]))


@settings(max_examples=40, deadline=None)
@given(st.permutations(SITES), st.integers(1, 5), st.sets(st.sampled_from(SITES), max_size=2))
def test_the_first_that_are_enough_make_the_sum_in_any_order(
    order: list[SiteId], enough: int, gone: set[SiteId]
) -> None:
    """Who falls silent after its keys, the round closes with the first ones of the others."""
    world = keyed(enough)
    world.gone = gone
    for site in order:
        if site not in gone:
            world.feed(vector(world, site))
    world.time_out()
    world.deliver()
    world.deliver()
    first = [site for site in order if site not in gone][: max(enough, 3)]
    assert isinstance(world.end, Close) and isinstance(world.end.total, Aggregate)
    agree(world.end.total, plain(PLAIN, tuple(s for s in SITES if s in first)))


def test_a_round_that_has_become_hopeless_ends_at_once() -> None:
    world = World().start()
    for site in SITES[:3]:
        world.feed(SiteLost(site, "over budget", final=True))
    assert isinstance(world.end, Fail)
    assert str(world.end.error).startswith("round 1: shares of 0 sites, and the masked sum needs")
    assert world.end.account.final == SITES[:3]
    assert {c.site for c in world.log if isinstance(c, CancelTask)} == {*SITES[3:]}


def test_an_abandoned_round_reveals_nothing_and_says_why() -> None:
    world = World().start()
    world.deliver()
    world.deliver()
    world.train()
    world.carry(world.round.abandon("the run was stopped"))
    assert isinstance(world.end, Fail) and isinstance(world.end.error, RoundFailed)
    assert str(world.end.error) == "round 1: the run was stopped"
    world.deliver()
    world.time_out()
    assert len([c for c in world.log if isinstance(c, Close | Fail)]) == 1


@pytest.mark.parametrize("how", ["alone", "in a region's sum"])
def test_an_answer_in_the_clear_is_dropped(how: str) -> None:
    world = World().start()
    world.deliver()
    summand = Summand(BERN, OPENING.task_id(BERN), 1.0, "00")
    world.feed(
        UpdateArrived(update(BERN, PLAIN))
        if how == "alone"
        else SumArrived(Sum(1, (summand,), {}, {}), SiteId("region"))
    )
    world.gone.add(BERN)
    world.deliver()
    world.train()
    world.deliver()
    world.deliver()
    assert isinstance(world.end, Close)
    assert world.end.account.missing == {BERN: "its answer came unmasked, and was dropped"}


def test_a_message_for_another_task_changes_nothing() -> None:
    world = World()
    world.gone = {*SITES}
    world.start()
    said = world.veil.begin(
        next(c.task for c in world.log if isinstance(c, SendTask) and c.task.site == BERN)
    )
    assert isinstance(said, Said)
    assert world.round.handle(replace(said, task=TaskId("other"))) == []
    assert world.round.progress == "0 of 5 sites' masked vectors came"


def test_a_malformed_vector_is_its_site_s_loss() -> None:
    world = World().start()
    world.deliver()
    world.deliver()
    context = terms_of(OPENING, PLAIN, SA1, world.veil.roster).context
    words = torch.zeros(3, dtype=torch.int32).numpy().view("uint32")
    world.feed(Said(OPENING.task_id(BERN), Masked(context, BERN), words))
    world.gone.add(BERN)
    world.train()
    world.deliver()
    world.deliver()
    assert isinstance(world.end, Close)
    assert "answer refused: a masked vector of (3,)" in world.end.account.missing[BERN]


def test_scores_are_means_over_all_rows() -> None:
    opening = replace(OPENING, kind="evaluate")
    world = World(PLAIN, opening).start()
    world.deliver()
    world.deliver()
    for place, site in enumerate(SITES):
        totals = {"accuracy": 5.0 + place, "unasked": 1.0}
        report = Report(opening.task_id(site), 1, site, totals, 10.0 + place)
        world.feed(world.veil.mask(report))
    world.deliver()
    world.deliver()
    assert isinstance(world.end, Close)
    assert world.end.total == pytest.approx({"accuracy": 35 / 60})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": 101.0}, "weight 1.01 of the cap"),
        ({"delta": Params({"w": torch.zeros(2)})}, "names differ"),
        ({"slots": {"control": MODEL}}, "not what plain reports"),
        ({"delta": values(1).map(lambda t: t * float("nan"))}, "holds nan"),
    ],
    ids=["weight", "layout", "slots", "nan"],
)
def test_an_update_that_cannot_be_summed_is_its_site_s_loss(
    change: dict[str, object], reason: str
) -> None:
    world = World().start()
    world.deliver()
    world.deliver()
    lost = world.veil.mask(replace(update(BERN, PLAIN), **change))  # type: ignore[arg-type]
    assert isinstance(lost, SiteLost)
    assert reason in lost.reason


def test_how_much_was_clipped_is_known_of_all_together() -> None:
    world = World().start()
    world.deliver()
    world.deliver()
    for site in SITES:
        one = update(site, PLAIN)
        delta = one.delta * 4 if site == BERN else one.delta
        world.feed(world.veil.mask(replace(one, delta=delta)))
    world.deliver()
    world.deliver()
    assert isinstance(world.end, Close) and isinstance(world.end.total, Aggregate)
    weight = 10 / sum(10 + 7 * k for k in range(5))
    assert 0.3 * weight < world.end.total.metrics["clipped"] < weight


def test_a_brief_s_digest_is_that_of_the_blob_it_travels_in() -> None:
    from blake3 import blake3

    from fedml.params import encode

    brief = Brief(MODEL, "scaffold", slots={"control": values(1)})
    whole = b"".join(encode({"": MODEL, "control": values(1)}))
    assert brief.digest() == blake3(whole).hexdigest()
    assert PLAIN.digest() == blake3(b"".join(encode({"": MODEL}))).hexdigest()
    assert terms_of(OPENING, PLAIN, SA1, Veil(SA1, SITES).roster).model == PLAIN.digest()
