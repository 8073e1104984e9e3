"""What a hostile coordinator would try where sites share the noise of their sum, and what it gets.

The sum of a round is protected by the shares of noise in it, so whoever can open a sum with fewer
of them, or see one site's alone, has what was not accounted for. As in `test_secagg`, each attack
is also played with its defence taken out, and then it succeeds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from scipy import stats
from torch import Tensor

from fedml.errors import Contradiction, Refused, Untrusted
from fedml.params import Params
from fedml.privacy.accounting import training_event
from fedml.privacy.shares import grain_of
from fedml.protocol.messages import (
    Assignment,
    Blob,
    Privacy,
    RecipeId,
    RunId,
    SiteId,
    TaskId,
    Training,
)
from fedml.protocol.secagg import Adverts, Masking, Part, Secagg
from fedml.protocol.tasks import Brief, Update
from fedml.rounds import Cohort, Evaluation, MaskedRound, Opening, Plan, Relay
from fedml.rounds.round import Close, DeadlinePassed, SendTask
from fedml.secagg import Demands, Member, Roster, Site, Terms
from fedml.secagg.masking import Total
from fedml.simulation.executors.base import Holding
from fedml.simulation.executors.inline import Inline
from fedml.simulation.veil import Veil
from fedml.site import gate
from fedml.site.policy import AllowedRecipe, Dataset, Policy
from fedml.strategies import Aggregate, FedAvg
from tests.secagg.worlds import Host, World
from tests.simulation.test_distributed import Wide, rows_of

torch.set_num_threads(1)
defences = pytest.mark.parametrize("defended", [True, False], ids=["defended", "mutated"])

SITES = tuple(SiteId(name) for name in ("bern", "kyoto", "lima", "oslo", "quito"))
RECIPE = RecipeId("wide", "ab" * 32)
RUN = RunId("run-1")
SA1 = Secagg("sa1", weight_cap=100.0)
STEP = Training(lr=0.5, steps=1)
FOUR = Privacy("record_distributed", 3.0, 1e-5, clip=0.5, rounds=10, sharers=4)
WHOLE = (Part("noised:float32", 5000, 1.0, whole=True),)
MASKING = Masking(1, SITES, 4, WHOLE, SA1)
ORDER = Assignment(
    task=TaskId("run-1.1.1.bern"),
    run=RUN,
    round=1,
    kind="train",
    recipe=RECIPE,
    dataset="records",
    model=Blob("00" * 32, 10),
    training=STEP,
    privacy=FOUR,
    cohort=5,
    masking=MASKING.to_json(),
)
POLICY = Policy(
    minimum_cohort=3,
    recipes={"wide": AllowedRecipe(RECIPE.digest)},
    datasets={
        "records": Dataset(Path("t"), 50, ("wide",), privacy="record_distributed", epsilon=3.0),
        "strict": Dataset(Path("t"), 50, ("wide",), epsilon=3.0),
        "whole": Dataset(Path("t"), 50, ("wide",), privacy="site_distributed", site_epsilon=3.0),
    },
)
ROWS = {site: 10 + 7 * place for place, site in enumerate(SITES)}
CHANCE = 1e-6  # of a test of noise that fails with nothing wrong, on either side


def decide(order: Assignment, policy: Policy = POLICY) -> gate.Permit:
    return gate.decide(policy, order, [RECIPE])


def masked(**changes: object) -> Assignment:
    return replace(ORDER, masking=replace(MASKING, **changes).to_json())  # type: ignore[arg-type]


def open_gate(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gate, "_check_sharers", lambda *_: None)


def sum_of(survivors: int, privacy: Privacy, quorum: int) -> tuple[Tensor, float]:
    """Play a masked round that all but `survivors` sites drop out of; no gradient is other than 0.

    Return what the coordinator opens, in units of clipped gradients' sum, and the noise's
    deviation there that each of the sites accounted for.
    """
    recipe = Wide(flat=True)
    brief = Brief(Params(recipe.build().state_dict()))
    opening, grain = Opening(RUN, 1, 1, SITES, quorum, 60.0), grain_of(STEP, privacy)
    veil = Veil(SA1, SITES, grain=grain)
    round_ = MaskedRound(opening, SA1, veil.roster, grain=grain)
    veil.open(opening)
    tasks = [c.task for c in round_.open(brief) if isinstance(c, SendTask)]
    inbox = [c for task in tasks for c in round_.handle(veil.begin(task))]
    for phase in range(4):
        relays = [c for c in inbox if isinstance(c, Relay)]
        inbox = [c for r in relays if (said := veil.hear(r)) for c in round_.handle(said)]
        if phase == 1:
            alone = Cohort(quorum=privacy.sharers, deadline=60.0)
            plan = plan_of(privacy, quorum, cohort=alone, secagg=Secagg())
            holdings = {s: Holding(rows_of(n, n), rows_of(1, 0)) for s, n in ROWS.items()}
            for update in Inline(plan, recipe, holdings).run(tasks[:survivors]):
                assert isinstance(update, Update)
                inbox += round_.handle(veil.mask(update))
            if survivors < len(SITES):
                inbox += round_.handle(DeadlinePassed())
    [close] = [c for c in inbox if isinstance(c, Close)]
    assert isinstance(close.total, Aggregate) and close.total.count == survivors
    assert close.total.weight == sum(ROWS[site] for site in SITES[:survivors])
    assert not close.total.metrics and not close.total.slots  # nothing beside the sum
    released = close.total.delta.buffers[torch.float32].double() * close.total.weight / STEP.lr
    return released, training_event(STEP, privacy, 50).noise * privacy.clip


def plan_of(privacy: Privacy, quorum: int, **changes: object) -> Plan:
    fields: dict[str, object] = {
        "model": "wide",
        "recipe": RECIPE,
        "dataset": "records",
        "strategy": FedAvg(),
        "training": STEP,
        "cohort": Cohort(quorum=quorum, deadline=60.0, sites=SITES),
        "rounds": privacy.rounds,
        "privacy": privacy,
        "secagg": SA1,
        "evaluation": Evaluation(at_end=False),
    }
    return Plan(**{**fields, **changes})  # type: ignore[arg-type]


def squares(noise: Tensor, std: float) -> float:
    return float((noise / std).square().sum())


# --- the noise in what can be opened -----------------------------------------------------------


@pytest.mark.parametrize("survivors", [4, 5])
def test_dropouts_down_to_the_sharers_leave_the_noise_that_was_accounted_for(
    survivors: int,
) -> None:
    noise, std = sum_of(survivors, FOUR, quorum=4)
    std *= math.sqrt(survivors / 4)
    low, high = stats.chi2.ppf([CHANCE / 2, 1 - CHANCE / 2], noise.numel())
    assert low < squares(noise, std) < high * 1.0004  # a grid of a sixteenth adds 1 / (12 * 256)
    assert abs(float(noise.sum())) < 5.5 * std * math.sqrt(noise.numel())


@defences
def test_threshold_lowered_below_the_sharers(
    monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    lowered = masked(threshold=3)
    if defended:
        with pytest.raises(Refused, match="policy colluders = 0: the masked sum may be of 3 sites"):
            decide(lowered)
        assert decide(ORDER).event == training_event(STEP, FOUR, 50)
        return
    open_gate(monkeypatch)
    assert decide(lowered).event == training_event(STEP, FOUR, 50)
    noise, std = sum_of(3, FOUR, quorum=3)  # and 3 of 4 shares are what it gets
    assert squares(noise, std) < stats.chi2.ppf(CHANCE, noise.numel())


@defences
def test_sites_that_help_the_coordinator_subtract_their_own_shares(
    monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """A policy that assumes colluders wants the noise whole without theirs."""
    wary = replace(POLICY, colluders=1)
    if defended:
        with pytest.raises(Refused, match="policy colluders = 1: the masked sum may be of 4 sites"):
            decide(ORDER, wary)
        three = replace(ORDER, privacy=replace(FOUR, sharers=3))
        assert decide(three, wary).event == training_event(STEP, FOUR, 50)
        return
    open_gate(monkeypatch)
    assert decide(ORDER, wary).event == training_event(STEP, FOUR, 50)


@defences
def test_sharers_above_the_quorum(monkeypatch: pytest.MonkeyPatch, defended: bool) -> None:
    if defended:
        with pytest.raises(Contradiction, match=r"sharers 4 is above cohort\.quorum 3"):
            plan_of(FOUR, quorum=3)
        with pytest.raises(Refused, match="add too little noise if it is to be the shares of 5"):
            decide(replace(ORDER, privacy=replace(FOUR, sharers=5)))
        return
    open_gate(monkeypatch)
    decide(replace(ORDER, privacy=replace(FOUR, sharers=1000)))
    noise, std = sum_of(5, replace(FOUR, sharers=1000), quorum=5)
    assert squares(noise, std) < stats.chi2.ppf(CHANCE, noise.numel())


def test_a_whole_site_s_update_is_refused_for_the_same_reasons() -> None:
    whole = replace(ORDER, dataset="whole", privacy=replace(FOUR, mode="site_distributed"))
    assert decide(whole).event == training_event(STEP, whole.privacy, 50)
    for wrong, reason in (
        (replace(whole, masking=""), "mode 'site_distributed' adds a share of the noise alone"),
        (replace(whole, masking=masked(threshold=3).masking), "masked sum may be of 3 sites"),
        (replace(whole, privacy=replace(whole.privacy, sharers=5)), "the shares of 5"),
        (replace(whole, dataset="records"), "privacy = 'record_distributed': the task asks for"),
        (replace(whole, kind="evaluate"), "held_out is not set|scores are not noised"),
    ):
        with pytest.raises(Refused, match=reason):
            decide(wrong)


# --- what is not the sum -----------------------------------------------------------------------


@defences
def test_an_order_that_is_not_masked(monkeypatch: pytest.MonkeyPatch, defended: bool) -> None:
    bare = replace(ORDER, masking="")
    if defended:
        with pytest.raises(Refused, match="the task's answer would not be masked"):
            decide(bare)
        with pytest.raises(Refused, match="the task's answer would not be masked"):
            decide(replace(bare, kind="evaluate"))
        return
    open_gate(monkeypatch)
    decide(bare)


def test_a_policy_that_trusts_nobody_takes_no_share_for_the_noise() -> None:
    wanted = r"policy datasets\.strict\.privacy = 'record': the task asks for mode 'record_distrib"
    with pytest.raises(Refused, match=wanted):
        decide(replace(ORDER, dataset="strict"))
    alone = Privacy("record", 3.0, 1e-5, rounds=10)
    assert decide(replace(ORDER, dataset="strict", privacy=alone)).event is not None
    assert decide(replace(ORDER, privacy=alone)).event is not None  # who may do less may do more


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        ((*WHOLE, Part("metric clipped", 1, 1.0, fine=True)), "metric clipped"),
        ((replace(WHOLE[0], whole=False),), "noised:float32"),
        ((replace(WHOLE[0], whole=False, fine=True),), "noised:float32"),
    ],
    ids=["a metric beside", "clipped", "fine"],
)
def test_a_sum_of_something_else_is_refused(parts: tuple[Part, ...], name: str) -> None:
    with pytest.raises(Refused, match=f"nothing beside it: the task asks for '{name}' too"):
        decide(masked(parts=parts))


@defences
def test_a_clip_of_one_step_reads_the_signs_of_a_single_share(
    monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """Numbers that are clipped one by one and weighed by public weights can be told apart."""
    parts = (replace(WHOLE[0], size=200, whole=False),)
    if defended:
        with pytest.raises(Refused, match="hides a sum in whole numbers"):
            decide(masked(parts=parts))
        return
    open_gate(monkeypatch)
    decide(masked(parts=parts))
    world = World(3, parts)
    draw = np.random.default_rng(0)
    world.weights = dict(zip(world.sites, (25.0, 50.0, 100.0), strict=True))
    world.values = {
        site: {"noised:float32": draw.normal(0, 8, 200).round() * 2 + 1} for site in world.sites
    }
    total, seen = opened(world), np.empty(200)
    total.mean_into("noised:float32", seen, 1)
    code = np.rint((seen * 7 + 7) / 2).astype(int)  # the sites' signs are its three bits
    victim = world.values[world.sites[0]]["noised:float32"] > 0
    assert np.array_equal(code & 1 == 1, victim)


def opened(world: World) -> Total:
    host = Host.over(world)
    host.play()
    return host.coordinator.finish()


# --- lies that differ --------------------------------------------------------------------------


@defences
def test_another_number_of_sharers_for_each_site(
    monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """Told of fewer sharers, one site adds more noise; told of more, it would be the others' who
    add too little for it. Each accounts for what it was told, so all must be told the same."""
    keys = {site: Ed25519PrivateKey.generate() for site in SITES}
    roster = Roster(
        tuple(Member(site, key.public_key().public_bytes_raw()) for site, key in keys.items())
    )
    if not defended:
        monkeypatch.setattr("fedml.secagg.terms.about", lambda *_: "")
    orders = {
        site: replace(ORDER, privacy=replace(FOUR, sharers=1 if site == SITES[0] else 4))
        for site in SITES
    }
    assert all(decide(order) for order in orders.values())  # each by itself is in order
    sessions = {
        site: Site(
            site,
            keys[site],
            roster,
            Terms.of(order, MASKING, roster),
            demands=Demands(),
        )
        for site, order in orders.items()
    }
    adverts = tuple(session.advertise() for session in sessions.values())
    for site, session in sessions.items():
        told = Adverts(
            session.terms.context,
            tuple(replace(a, context=session.terms.context) for a in adverts),
        )
        if not defended:
            session.share(told)
            continue
        with pytest.raises(Untrusted, match="its identity key did not sign this for this round"):
            session.share(told)
        assert site in SITES
