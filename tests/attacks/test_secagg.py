"""What a hostile coordinator would try in a masked round, and what it gets.

Each attack runs twice: against the site as it is, which refuses, and against one whose defence
is taken out, from which it gets what it came for. So none passes for want of a working attack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedml.errors import ConfigError, Refused, Untrusted
from fedml.protocol.messages import SiteId
from fedml.protocol.secagg import Advert, Adverts, Boxes, Consents, Survivors, Unmasking
from fedml.secagg import Demands, Member, Part, Roster, Site, Terms, keys, session, shares
from fedml.secagg.masking import Floats, Mask, Total, Words
from tests.secagg.worlds import Host, World, plain

defences = pytest.mark.parametrize("defended", [True, False], ids=["defended", "mutated"])
VICTIM = SiteId("site-00")


@pytest.fixture
def world() -> World:
    return World(5)


def take_out(patch: pytest.MonkeyPatch, *checks: str) -> None:
    """Leave out checks of `Site`."""
    for check in checks:
        patch.setattr(Site, check, lambda *_: None)


def at_masked(world: World, terms: Terms | None = None) -> Host:
    """Return a round in which all vectors have come, and the coordinator may say what it likes."""
    host = Host.over(world, terms)
    for _ in range(3):
        host.phase()
        host.advance()
    return host


def stripped(words: Words, masks: Iterable[Mask], terms: Terms) -> Words:
    """Return `words` less `masks`, as the coordinator would take them off."""
    total = Total(terms.grid)
    total.add(words, threads=1)
    total.unmask([replace(mask, sign=-mask.sign) for mask in masks], threads=1)
    return total._words


def pair_masks(host: Host, victim: SiteId, private: bytes) -> list[Mask]:
    """Return the masks on the victim's vector that follow from its private mask key."""
    terms, adverts = host.coordinator.terms, host.coordinator._adverts
    digest = session.digest_of(adverts.values())
    return [
        Mask(
            session.mask_key(of_raw(private), advert.mask_key, terms.context, digest),
            session.sign_of(terms, victim, other),
        )
        for other, advert in adverts.items()
        if other != victim
    ]


def combined(terms: Terms, held: Mapping[SiteId, bytes]) -> bytes:
    assert len(held) >= terms.threshold
    return shares.combine({terms.places[site]: share for site, share in held.items()})


def consents(host: Host, sites: Iterable[SiteId], told: Iterable[SiteId]) -> Consents:
    """Tell `sites` that `told` survived; return their signatures."""
    context = host.coordinator.terms.context
    message = Survivors(context, tuple(told))
    return Consents(context, {s: host.sites[s].consent(message).signature for s in sites})


def both_secrets(
    host: Host, victim: SiteId, seeds: Mapping[SiteId, bytes], mask_keys: Mapping[SiteId, bytes]
) -> Words:
    """Return the victim's words, from shares of its seed and of its mask key."""
    terms = host.coordinator.terms
    own = Mask(combined(terms, seeds), 1)
    pairs = pair_masks(host, victim, combined(terms, mask_keys))
    return stripped(host.words[victim], [own, *pairs], terms)


@defences
def test_key_substitution_by_the_coordinator(
    world: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    terms = world.terms()
    victim = world.site(VICTIM)
    mine = {site: X25519PrivateKey.generate() for site in world.sites[1:]}
    advert = victim.advertise()
    forged = [
        replace(world.site(site).advertise(), box_key=public(key), mask_key=public(key))
        for site, key in mine.items()
    ]
    if defended:
        with pytest.raises(Untrusted, match="identity key did not sign this"):
            victim.share(Adverts(terms.context, (advert, *forged)))
        return
    take_out(monkeypatch, "_check_advert")
    message = victim.share(Adverts(terms.context, (advert, *forged)))
    digest = session.digest_of((advert, *forged))
    seeds, masks, boxes = {}, [], {}
    for site, key in mine.items():
        channel = session.box_key(key, advert.box_key, terms.context, digest)
        about = (terms.context, VICTIM, site)
        seeds[site], _ = keys.unseal(channel, about, message.boxes[site])
        back = (terms.context, site, VICTIM)
        boxes[site] = keys.seal(channel, back, (bytes(33), bytes(33)), lambda n: bytes(n))
        shared = session.mask_key(key, advert.mask_key, terms.context, digest)
        masks.append(Mask(shared, session.sign_of(terms, VICTIM, site)))
    victim.receive(Boxes(terms.context, boxes))
    words = np.concatenate([*victim.mask(world.values[VICTIM], world.weights[VICTIM], 1)])
    masks.append(Mask(combined(terms, seeds), 1))
    assert np.array_equal(stripped(words, masks, terms), plain(world, VICTIM, terms))


def mask_key_of(site: Site) -> X25519PrivateKey:
    assert site._mask_key
    return site._mask_key


def of_raw(key: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(key)


def public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


@pytest.mark.parametrize("other", [{"round": 2}, {"model": "cd" * 32}, {"attempt": 2}], ids=str)
@defences
def test_replayed_keys_of_another_round_or_model(
    world: World, monkeypatch: pytest.MonkeyPatch, other: dict[str, object], defended: bool
) -> None:
    terms = world.terms()
    old = {site: world.site(site, world.terms(**other)) for site in world.sites[1:]}
    known = {site: mask_key_of(one) for site, one in old.items()}  # as if dropped
    if not defended:
        monkeypatch.setattr(
            session, "signed_advert", lambda _context, site, *pair: b"".join(pair) + site.encode()
        )
    replayed = [replace(site.advertise(), context=terms.context) for site in old.values()]
    victim = world.site(VICTIM)
    advert = victim.advertise()
    if defended:
        with pytest.raises(Untrusted, match="or is for another run, round, model or terms"):
            victim.share(Adverts(terms.context, (advert, *replayed)))
        return
    victim.share(Adverts(terms.context, (advert, *replayed)))
    victim._held |= dict.fromkeys(old, (b"", b""))
    digest = session.digest_of((advert, *replayed))
    guessed = [
        session.mask_key(known[site], advert.mask_key, terms.context, digest) for site in old
    ]
    assert [mask.key for mask in victim._masks()[1:]] == guessed  # only its own mask is left


@defences
def test_cohort_below_threshold(
    world: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """The victim is told that all but a friend of the coordinator fell out."""
    friend, *others = world.sites[1:]
    host = Host.over(world)
    terms = host.coordinator.terms
    host.phase()
    host.advance()
    host.phase()
    inbox = host.coordinator.advance()
    told = inbox[VICTIM]
    assert isinstance(told, Boxes)
    few = replace(told, boxes={friend: told.boxes[friend]})
    if defended:
        with pytest.raises(Refused, match=r"shares of 2 sites, and the sum is to be of at least 3"):
            host.sites[VICTIM].receive(few)
        return
    take_out(monkeypatch, "_check_enough")
    host.inbox = {**inbox, VICTIM: few}
    host.phase()
    seeds = {}
    for site in (VICTIM, *others):
        list(consents(host, [site], {VICTIM, site}).signatures)
        seeds[site] = host.sites[site].unmask(Consents(terms.context, {})).seeds[VICTIM]
    digest = session.digest_of(host.coordinator._adverts.values())
    public = host.coordinator._adverts[VICTIM].mask_key
    key = session.mask_key(mask_key_of(host.sites[friend]), public, terms.context, digest)
    masks = [Mask(combined(terms, seeds), 1), Mask(key, session.sign_of(terms, VICTIM, friend))]
    assert np.array_equal(stripped(host.words[VICTIM], masks, terms), plain(world, VICTIM, terms))


@defences
def test_two_survivor_lists_in_a_split_view(
    world: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """Each site is told another list, so that all but two seem lost to enough of the others.

    What is left is a sum of two, and one of them helps the coordinator.
    """
    host = at_masked(world)
    terms = host.coordinator.terms
    friend, one, two, three = world.sites[1:]
    third = {VICTIM: one, friend: two, one: one, two: two, three: three}
    signed = {
        site: consents(host, [site], {VICTIM, friend, third[site]}).signatures[site]
        for site in world.sites
    }
    if defended:
        for site in world.sites:
            mine = {VICTIM, friend, third[site]}
            told = Consents(terms.context, {other: signed[other] for other in mine})
            with pytest.raises(Untrusted, match="identity key did not sign this"):
                host.sites[site].unmask(told)
        return
    take_out(monkeypatch, "_check_consents")
    replies = [host.sites[site].unmask(Consents(terms.context, signed)) for site in world.sites]
    masks = []
    for site in (VICTIM, friend):
        masks.append(Mask(combined(terms, {r.site: r.seeds[site] for r in replies}), 1))
    for site in (one, two, three):
        told_lost = {r.site: r.keys[site] for r in replies if site in r.keys}
        for mask in pair_masks(host, site, combined(terms, told_lost)):
            masks.append(replace(mask, sign=-mask.sign))
    digest = session.digest_of(host.coordinator._adverts.values())
    inside = {
        session.mask_key(
            of_raw(combined(terms, {r.site: r.keys[a] for r in replies if a in r.keys})),
            host.coordinator._adverts[b].mask_key,
            terms.context,
            digest,
        )
        for a in (one, two, three)
        for b in (one, two, three)
        if a != b
    }
    outside = [mask for mask in masks if mask.key not in inside]
    pair_sum = host.words[VICTIM] + host.words[friend]
    found = stripped(pair_sum, outside, terms) - plain(world, friend, terms)
    assert np.array_equal(found, plain(world, VICTIM, terms))


@defences
def test_a_second_unmask_request(
    world: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    if not defended:
        take_out(
            monkeypatch, "_check_phase", "_check_same_survivors", "_check_unreleased", "forget"
        )
    host = at_masked(world)
    terms, others = host.coordinator.terms, world.sites[1:]
    told = consents(host, world.sites, world.sites)
    first = {site: host.sites[site].unmask(told) for site in world.sites}
    if defended:
        for site in others:
            with pytest.raises(Untrusted, match="session is OVER; each step is taken once"):
                host.sites[site].unmask(told)
            with pytest.raises(Untrusted, match="each step is taken once"):
                consents(host, [site], others)
            assert not any(host.sites[site]._seed) and host.sites[site]._mask_key is None
            assert not host.sites[site]._held
        return
    again = consents(host, others, others)
    second = {site: host.sites[site].unmask(again) for site in others}
    found = both_secrets(
        host,
        VICTIM,
        {site: reply.seeds[VICTIM] for site, reply in first.items()},
        {site: reply.keys[VICTIM] for site, reply in second.items()},
    )
    assert np.array_equal(found, plain(world, VICTIM, terms))


@defences
def test_another_attempt_at_a_sum_whose_shares_were_given(
    world: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """The second sum is over the same updates but one: the difference would be that one."""
    if not defended:
        take_out(monkeypatch, "_check_unreleased")
    host = Host.over(world)
    host.play()
    first = host.coordinator.finish()._words
    if defended:
        for site in world.sites:
            with pytest.raises(Refused, match=r"run-1\.3\.train: this site has given shares"):
                world.site(site, world.terms(attempt=2))
        return
    again = Host.over(world, world.terms(attempt=2))
    again.play({2: [VICTIM]})
    second = again.coordinator.finish()._words
    assert np.array_equal(first - second, plain(world, VICTIM, world.terms()))


def test_two_attempts_at_once_give_shares_for_one_of_them(world: World) -> None:
    hosts = [at_masked(world, world.terms(attempt=attempt)) for attempt in (1, 2)]
    told = [consents(host, world.sites, world.sites) for host in hosts]
    hosts[0].sites[VICTIM].unmask(told[0])
    with pytest.raises(Refused, match="this site has given shares for that sum"):
        hosts[1].sites[VICTIM].unmask(told[1])


@defences
def test_both_shares_of_one_site(
    world: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """A list of survivors is all that a site is asked with, so it cannot name a site twice."""
    if not defended:
        monkeypatch.setattr(Site, "_lost", lambda self: self._held.keys())
    host = at_masked(world)
    terms = host.coordinator.terms
    told = consents(host, world.sites, [*world.sites, VICTIM])
    replies = [host.sites[site].unmask(told) for site in world.sites]
    if defended:
        assert not any(reply.seeds.keys() & reply.keys.keys() for reply in replies)
        assert not any(VICTIM in reply.keys for reply in replies)
        return
    seeds, mask_keys = ({r.site: part(r)[VICTIM] for r in replies} for part in (of_seeds, of_keys))
    found = both_secrets(host, VICTIM, seeds, mask_keys)
    assert np.array_equal(found, plain(world, VICTIM, terms))


def of_seeds(reply: Unmasking) -> Mapping[SiteId, bytes]:
    return reply.seeds


def of_keys(reply: Unmasking) -> Mapping[SiteId, bytes]:
    return reply.keys


@defences
def test_a_sybil_site(world: World, defended: bool) -> None:
    """Two of three sites are the coordinator's inventions."""
    sybils = {SiteId(name): Ed25519PrivateKey.generate() for name in ("sybil-1", "sybil-2")}
    invented = [Member(s, key.public_key().public_bytes_raw()) for s, key in sybils.items()]
    theirs = Roster((Member(VICTIM, world.roster.keys[VICTIM]), *invented))
    terms = world.terms(roster=theirs.digest, cohort=(VICTIM, *sybils), threshold=3)
    if defended:
        with pytest.raises(Untrusted, match="the operator must accept a new roster"):
            world.site(VICTIM, terms)
        with pytest.raises(Untrusted, match="sybil-1 is not on the roster that was accepted"):
            world.site(VICTIM, replace(terms, roster=world.roster.digest))
        return
    world.identities |= sybils  # a site that takes the coordinator's list of who is who
    zeros: dict[str, Floats] = {p.name: np.zeros(p.size, np.float32) for p in world.parts}
    world.values |= dict.fromkeys(sybils, zeros)
    world.weights |= dict.fromkeys(sybils, 1.0)
    cohort = {s: Site(s, world.identities[s], theirs, terms) for s in terms.cohort}
    host = Host(world, type(Host.over(world).coordinator)(theirs, terms), cohort)
    world.sites = terms.cohort
    host.play()
    words = host.coordinator.finish()._words
    assert np.array_equal(words[:-2], plain(world, VICTIM, terms)[:-2])


def test_a_sybil_s_keys_among_the_adverts(world: World) -> None:
    sybil = Ed25519PrivateKey.generate()
    terms, victim = world.terms(), world.site(VICTIM)
    adverts = [victim.advertise(), *(world.site(s).advertise() for s in world.sites[1:4])]
    key = public(X25519PrivateKey.generate())
    for name, reason in (("sybil", "which is not in the cohort"), ("site-04", "did not sign")):
        signed = session.signed_advert(terms.context, SiteId(name), key, key)
        forged = Advert(terms.context, SiteId(name), key, key, sybil.sign(signed))
        fresh = world.site(VICTIM)
        own = fresh.advertise()
        with pytest.raises(Untrusted, match=reason):
            fresh.share(Adverts(terms.context, (own, *adverts[1:], forged)))


@pytest.mark.parametrize("lie", ["model", "parameter"])
@defences
def test_model_or_parameter_inconsistency(
    world: World, monkeypatch: pytest.MonkeyPatch, lie: str, defended: bool
) -> None:
    """All but the victim get a model that makes their update nothing, or so wide a grid.

    Source: Pasquini et al. 2022, arXiv:2111.07380, for models.
    """
    wide = (Part("delta", 1003, 5e5), world.parts[1])
    changes = {"model": "cd" * 32} if lie == "model" else {"parts": wide}
    if not defended:
        field = "model" if lie == "model" else "parts"
        honest = Terms.context.func  # type: ignore[attr-defined]
        fixed = getattr(world.terms(), field)
        monkeypatch.setattr(
            Terms, "context", property(lambda self: honest(replace(self, **{field: fixed})))
        )
    terms, lied = world.terms(), world.terms(**changes)
    host = Host.over(world, terms)
    host.sites |= {site: world.site(site, lied) for site in world.sites[1:]}
    for site in world.sites[1:]:
        scale = 0.0 if lie == "model" else 1e-3
        world.values[site]["delta"] = world.values[site]["delta"] * np.float32(scale)
    if defended:
        adverts = tuple(site.advertise() for site in host.sites.values())
        same = tuple(replace(advert, context=terms.context) for advert in adverts)
        for told in (adverts, same):
            fresh = world.site(VICTIM)
            mine = fresh.advertise()
            with pytest.raises(Untrusted, match="or is for another run, round, model or terms"):
                fresh.share(Adverts(terms.context, (mine, *told[1:])))
        with pytest.raises(Untrusted, match="its message is for another run, round, attempt"):
            host.coordinator.take(adverts[1])
        return
    host.play()
    found = host.coordinator.finish()._words[:1003].view(np.int32).astype(np.int64)
    true = plain(world, VICTIM, terms)[:1003].view(np.int32)
    assert np.abs(found - true).max() <= len(world.sites)


@defences
def test_threshold_lowered(world: World, defended: bool) -> None:
    """A friend signs two lists of three that have only it in common."""
    terms = world.terms(threshold=3)
    if defended:
        with pytest.raises(Refused, match="threshold 3 of 5 sites: this site's policy, which ass"):
            world.site(VICTIM, terms, Demands(colluders=1))
        with pytest.raises(ConfigError, match="threshold 2 of 5 sites: use 3 to 5"):
            world.terms(threshold=2)
        return
    host = at_masked(world, terms)
    one, two, three, friend = world.sites[1:]
    with_victim, without = (VICTIM, one, friend), (two, three, friend)
    friends_shares = host.sites[friend]._held[VICTIM]
    told = [dict(consents(host, sites[:2], sites).signatures) for sites in (with_victim, without)]
    for number, sites in enumerate((with_victim, without)):
        digest = session.digest_of(host.coordinator._adverts.values())
        message = session.signed_consent(terms.context, digest, world.sites, sites)
        told[number][friend] = world.identities[friend].sign(message)
    replies = [
        [host.sites[site].unmask(Consents(terms.context, given)) for site in list(given)[:2]]
        for given in told
    ]
    seeds = {r.site: r.seeds[VICTIM] for r in replies[0]} | {friend: friends_shares[0]}
    mask_keys = {r.site: r.keys[VICTIM] for r in replies[1]} | {friend: friends_shares[1]}
    found = both_secrets(host, VICTIM, seeds, mask_keys)
    assert np.array_equal(found, plain(world, VICTIM, terms))


@defences
def test_an_update_after_the_site_was_declared_dropped(
    world: World, monkeypatch: pytest.MonkeyPatch, defended: bool
) -> None:
    """The victim's masked vector is late: by then the others have given its mask key away."""
    if not defended:
        honest = Site._masks
        monkeypatch.setattr(Site, "_masks", lambda self: honest(self)[1:])  # no mask of its own
    host = Host.over(world)
    terms = host.coordinator.terms
    for _ in range(2):
        host.phase()
        host.advance()
    late, host.inbox = host.inbox[VICTIM], {**host.inbox}
    others = world.sites[1:]
    host.fill(others)
    host.advance()
    told = consents(host, others, others)
    replies = [host.sites[site].unmask(told) for site in others]
    message = host.answer(VICTIM, late)
    assert not host.give(message)
    assert VICTIM not in host.coordinator.survivors
    private = combined(terms, {reply.site: reply.keys[VICTIM] for reply in replies})
    found = stripped(host.words[VICTIM], pair_masks(host, VICTIM, private), terms)
    same = np.mean(found == plain(world, VICTIM, terms))
    assert same < 0.01 if defended else same == 1
    with pytest.raises(Untrusted, match="site-00 is not among the survivors"):
        consents(host, [VICTIM], others)


def test_a_box_that_was_changed_or_swapped_ends_the_session(world: World) -> None:
    for wrong in ("changed", "swapped"):
        host = Host.over(world)
        for _ in range(2):
            host.phase()
            host.advance()
        told = host.inbox[VICTIM]
        assert isinstance(told, Boxes)
        boxes = dict(told.boxes)
        one, two = world.sites[1:3]
        boxes[one] = boxes[two] if wrong == "swapped" else bytes(len(boxes[one]))
        victim = host.sites[VICTIM]
        with pytest.raises(Untrusted, match="the box from site-01 does not open"):
            victim.receive(replace(told, boxes=boxes))
        with pytest.raises(Untrusted, match="session is OVER"):
            victim.receive(told)


def test_a_message_of_another_context_ends_the_session(world: World) -> None:
    victim = world.site(VICTIM)
    victim.advertise()
    with pytest.raises(Untrusted, match="the message is for another run, round, attempt"):
        victim.share(Adverts(world.terms(round=4).context, ()))
    with pytest.raises(Untrusted, match="session is OVER"):
        victim.share(Adverts(world.terms().context, ()))


def test_a_second_vector_under_the_same_masks(world: World) -> None:
    host = at_masked(world)
    with pytest.raises(Untrusted, match="each step is taken once"):
        host.sites[VICTIM].mask(world.values[VICTIM], 1.0)
