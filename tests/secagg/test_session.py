"""A masked round's sum is that of all whose vectors came, exactly, or there is none."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedml.errors import MalformedMessage, MalformedUpdate, QuorumLost, RoundFailed, Untrusted
from fedml.protocol.messages import SiteId
from fedml.protocol.secagg import Consent, Masked, Shares, Unmasking
from fedml.secagg import Part, Site, Total, least_threshold
from fedml.secagg.masking import Words
from tests.secagg.worlds import Host, World, plain

PHASES = 5
NEVER = PHASES
PARTS = (Part("delta", 41, 0.5), Part("metrics", 2, 100.0, fine=True))
WORLDS = {count: World(count, PARTS) for count in range(3, 8)}


def exact(host: Host) -> Words:
    """Return the sum of the survivors' words, as if there were no masks."""
    terms = host.coordinator.terms
    rows = [plain(host.world, site, terms) for site in host.coordinator.survivors]
    total: Words = np.sum(rows, axis=0, dtype=np.uint32)
    return total


def fresh(count: int) -> Host:
    world = WORLDS[count]
    world.released = {site: set() for site in world.sites}
    return Host.over(world)


def reads(total: Total, host: Host) -> None:
    """Assert that the mean is what the survivors' numbers have."""
    out = np.empty(PARTS[0].size)
    total.mean_into("delta", out, 1)
    survivors, world = host.coordinator.survivors, host.world
    assert np.abs(out - world.mean(survivors, "delta")).max() < 1e-8
    assert total.mean("metrics") == pytest.approx(world.mean(survivors, "metrics"), rel=1e-12)
    assert total.weight * 100 == pytest.approx(sum(world.weights[s] for s in survivors), rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.integers(3, 7), st.data())
def test_any_history_of_dropouts_ends_exactly_or_with_nothing(
    count: int, data: st.DataObject
) -> None:
    host = fresh(count)
    when = data.draw(st.lists(st.integers(0, NEVER), min_size=count, max_size=count))
    shuffle = data.draw(st.randoms(use_true_random=False))
    losing = dict(zip(host.world.sites, when, strict=True))
    left, threshold = count, host.coordinator.terms.threshold
    try:
        for number in range(PHASES):
            left = sum(phase > number for phase in losing.values())
            in_any_order(host, {s for s, phase in losing.items() if phase > number}, shuffle)
            if number < PHASES - 1:
                host.advance()
        total = host.coordinator.finish()
    except QuorumLost:
        assert left < threshold
        return
    assert left >= threshold
    assert host.coordinator.survivors == tuple(s for s, phase in losing.items() if phase > 2)
    assert np.array_equal(total._words, exact(host))
    reads(total, host)


def in_any_order(host: Host, alive: set[SiteId], shuffle: random.Random) -> None:
    """Let `alive` answer in any order, some twice, which changes nothing."""
    names = sorted(host.coordinator.waiting)
    shuffle.shuffle(names)
    for name in names:
        if name not in alive:
            host.coordinator.lose(name)
            continue
        message = host.answer(name, host.inbox.get(name))
        assert host.give(message)
        if shuffle.random() < 0.3:
            assert not host.give(message)


@pytest.mark.parametrize("count", [3, 5, 10, 17])
@pytest.mark.parametrize("phase", range(PHASES))
def test_as_many_as_may_drop_out_at_one_phase_and_one_more(count: int, phase: int) -> None:
    spare = count - least_threshold(count)
    for more in (0, 1):
        host = Host.over(World(count, PARTS))
        losing = {phase: host.world.sites[: spare + more]}
        if not more:
            host.play(losing)
            reads(host.coordinator.finish(), host)
            continue
        with pytest.raises(QuorumLost, match="no update was revealed"):
            host.play(losing)
            host.coordinator.finish()


def test_another_attempt_after_a_failed_one_sums() -> None:
    world = World(5, PARTS)
    first = Host.over(world)
    with pytest.raises(QuorumLost):
        first.play({2: world.sites[:3]})
    second = Host.over(world, world.terms(attempt=2))
    second.play()
    reads(second.coordinator.finish(), second)


def test_a_masked_vector_looks_like_noise() -> None:
    """Its words are uniform, and it has nothing in common with the plain ones."""
    world = World(3, (Part("delta", 2**16, 0.5),))
    host = Host.over(world)
    host.play()
    for site, words in host.words.items():
        high = np.bincount(words >> 28, minlength=16)
        assert abs(high - len(words) / 16).max() < 6 * np.sqrt(len(words) / 16)
        own = plain(world, site, host.coordinator.terms)
        assert abs(np.corrcoef(words, own.view(np.int32))[0, 1]) < 0.03


def at(phase: int) -> Host:
    host = fresh(5)
    for _ in range(phase):
        host.phase()
        host.advance()
    return host


def test_the_coordinator_refuses_what_does_not_check_out() -> None:
    name = WORLDS[5].sites[0]
    host = at(0)
    advert = host.sites[name].advertise()
    with pytest.raises(Untrusted, match="identity key did not sign"):
        host.coordinator.take(replace(advert, signature=bytes(64)))
    assert not host.coordinator.take(advert)  # it is out
    host = at(1)
    shares = host.answer(name, host.inbox[name])
    assert isinstance(shares, Shares)
    with pytest.raises(MalformedMessage, match="its boxes are not for all the others"):
        host.coordinator.take(replace(shares, boxes={}))
    host = at(2)
    with pytest.raises(MalformedMessage, match="a masked vector without words"):
        host.coordinator.take(Masked(host.coordinator.terms.context, name))
    host = at(2)
    message = host.answer(name, host.inbox[name])
    with pytest.raises(MalformedUpdate, match="a masked vector of"):
        host.coordinator.take(message, np.zeros(7, np.uint32))
    host = at(3)
    consent = host.answer(name, host.inbox[name])
    assert isinstance(consent, Consent)
    with pytest.raises(Untrusted, match="identity key did not sign"):
        host.coordinator.take(replace(consent, signature=bytes(64)))
    host = at(4)
    unmasking = host.answer(name, host.inbox[name])
    assert isinstance(unmasking, Unmasking)
    with pytest.raises(MalformedMessage, match="its shares are not those asked for"):
        host.coordinator.take(replace(unmasking, seeds={}))


@pytest.mark.parametrize("secret", ["seed", "mask key"])
def test_shares_that_were_made_up_end_the_attempt_without_a_sum(secret: str) -> None:
    host = fresh(5)
    host.phase()
    host.advance()
    host.phase()
    host.advance()
    host.phase([host.world.sites[4]])
    host.advance()
    host.phase()
    host.advance()
    for number, name in enumerate(host.world.sites[:4]):
        message = host.answer(name, host.inbox[name])
        assert isinstance(message, Unmasking)
        if number == 0 and secret == "seed":
            message = replace(message, seeds={s: bytes(33) for s in message.seeds})
        if number == 0 and secret == "mask key":
            message = replace(message, keys={s: bytes(33) for s in message.keys})
        host.coordinator.take(message)
    with pytest.raises(RoundFailed, match="a site lied"):
        host.coordinator.finish()


def test_a_site_that_cannot_sum_its_update_says_so_and_the_others_go_on() -> None:
    host = at(2)
    name = host.world.sites[0]
    with pytest.raises(MalformedUpdate, match="weight 2 of the cap"):
        host.sites[name].receive(host.inbox[name])  # type: ignore[arg-type]
        host.sites[name].mask(host.world.values[name], 200.0)
    host.phase([name])
    host.advance()
    host.phase()
    host.advance()
    host.phase()
    reads(host.coordinator.finish(), host)


def test_secrets_are_erased_when_a_session_ends() -> None:
    host = at(4)
    for name, site in host.sites.items():
        assert any(site._seed) and site._held
        host.answer(name, host.inbox[name])
        assert not any(site._seed) and site._mask_key is None and site._box_key is None
        assert not site._held and not site._channels


def test_randomness_can_be_given_for_a_replay() -> None:
    world = World(3, PARTS)
    name, roster, terms = world.sites[0], world.roster, world.terms()
    adverts = [
        Site(
            name, world.identities[name], roster, terms, random=random.Random(seed).randbytes
        ).advertise()
        for seed in (1, 1, 2)
    ]
    assert adverts[0] == adverts[1] != adverts[2]
