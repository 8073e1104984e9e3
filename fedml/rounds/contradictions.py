"""What in a plan contradicts itself: every reason at once, each with the way out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedml.errors import ConfigError
from fedml.privacy.accounting import unit_of
from fedml.privacy.shares import grain_of
from fedml.protocol.messages import check_name
from fedml.protocol.parcels import is_coarse
from fedml.secagg.terms import LEAST_COHORT, least_threshold
from fedml.strategies import (
    Buffering,
    WeightedMean,
    buffering_of,
    contrasts,
    describe,
    in_turn,
    is_bounded,
    keeps_deltas,
    measures,
    needs_exact_model,
    needs_means,
    objections,
    rule_of,
    scores_exact,
)

if TYPE_CHECKING:
    from fedml.rounds.plan import Cohort, Plan

_ROOM = 2.0**30  # steps of a sum that surely fit the ring, with the noise


def contradictions(plan: Plan) -> list[str]:
    """Return every reason why `plan` cannot run; none if it can."""
    reasons = [*_names(plan), *_counts(plan), *_cohort(plan.cohort), *_privacy(plan)]
    reasons += [*_strategy(plan), *_reducer(plan), *_scoring(plan), *_wire(plan)]
    return [*reasons, *_secagg(plan), *_buffered(plan)]


def _names(plan: Plan) -> Iterator[str]:
    for what, name in (("model", plan.model), ("dataset", plan.dataset)):
        try:
            check_name(what, name)
        except ConfigError as error:
            yield str(error)
    try:
        describe(plan.strategy)
    except ConfigError as error:
        yield str(error)


def _counts(plan: Plan) -> Iterator[str]:
    for what, value in (("rounds", plan.rounds), ("attempts", plan.attempts)):
        if value < 1:
            yield f"{what} {value}: set it to 1 or more"
    if plan.parent < 0:
        yield f"parent {plan.parent}: give a version of {plan.model}, or 0 for a fresh start"
    if not 0 <= plan.seed < 2**63:
        yield f"seed {plan.seed}: use 0 to 2^63 - 1"
    if not 0 <= plan.patience < math.inf:
        yield f"patience {plan.patience}: give the seconds to wait for sites, 0 or more"


def _cohort(cohort: Cohort) -> Iterator[str]:
    sites, size, quorum = cohort.sites, cohort.size, cohort.quorum
    if quorum < 1:
        yield f"cohort.quorum {quorum}: at least one site must answer"
    if not 0 < cohort.deadline < math.inf:
        yield f"cohort.deadline {cohort.deadline}: give the seconds a round may take"
    if size < 0:
        yield f"cohort.size {size}: use 0 for all sites, or a number of them"
    if 0 < size < quorum:
        yield f"cohort.quorum {quorum} is above cohort.size {size}: lower one or raise the other"
    if sites and quorum > len(sites):
        yield f"cohort.quorum {quorum} is above the {len(sites)} sites listed: lower it, add sites"
    if sites and size > len(sites):
        yield f"cohort.size {size} is above the {len(sites)} sites listed: lower it or add sites"
    if twice := sorted(site for site, n in Counter(sites).items() if n > 1):
        yield f"cohort.sites lists {', '.join(twice)} more than once: list each site once"


def _strategy(plan: Plan) -> Iterator[str]:
    strategy, cohort = plan.strategy, plan.cohort
    name, reducer = type(strategy).__name__, strategy.reducer
    if not reducer.linear and needs_means(strategy):
        yield (
            f"strategy {name} with reducer {type(reducer).__name__}: its sites report slots that "
            "only a mean leaves in step with the deltas; use reducer=weighted-mean, or "
            "strategy=fedavg"
        )
    if in_turn(strategy) and cohort.size != 1:
        yield (
            f"strategy {name} with cohort.size {cohort.size}: its sites train one after the other, "
            "set cohort.size=1 and cohort.quorum=1"
        )
    yield from objections(strategy, plan.training)
    sites = getattr(strategy, "sites", None)
    if sites is None:
        return
    if sites == 0 and cohort.size and cohort.size != len(cohort.sites):
        yield (
            f"strategy {name} with cohort.size {cohort.size} and strategy.sites 0: it must know "
            "of how many sites these are a part, set strategy.sites to the number of them all"
        )
    least = max(cohort.size, len(cohort.sites), cohort.quorum)
    if 0 < sites < least:
        yield f"strategy.sites {sites} is below the {least} that the cohort names: raise it"


def _buffered(plan: Plan) -> Iterator[str]:
    buffering, cohort = buffering_of(plan.strategy), plan.cohort
    if buffering is None:
        return
    name, size, stale = f"strategy {type(plan.strategy).__name__}", buffering.size, buffering.most
    if 0 < size < cohort.quorum:
        yield (
            f"cohort.quorum {cohort.quorum} is above the {size} updates that make a step of "
            f"{name}: lower it, or raise strategy.buffer if there is one"
        )
    most = cohort.size or len(cohort.sites)
    if 0 < most < size:
        yield f"strategy.buffer {size} is above the {most} sites asked at a time: lower it"
    if plan.secagg.is_on and size != 1:  # of one nothing makes a sum
        yield from _masked_buffer(plan, buffering, most)
    if stale and plan.privacy.mode == "record_distributed":
        yield (
            f"strategy.max_staleness {stale} with {plan.privacy.mode} privacy: shares of noise are "
            "made for a sum of equals, and stale updates shrink with theirs; set it to 0, or use "
            "privacy=record"
        )
    elif plan.privacy.mode != "none" and unit_of(plan.privacy.mode) == "site":
        yield (
            f"{name} with {plan.privacy.mode} privacy: without a site another would be in its "
            "place, so sums differ by more than the clip; use strategy=fedavg, or privacy=record"
        )


def _masked_buffer(plan: Plan, buffering: Buffering, asked: int) -> Iterator[str]:
    """Say what keeps a masked round from closing with a buffer; `asked` 0 is not known yet."""
    if buffering.most:
        yield (
            f"strategy.max_staleness {buffering.most} with secagg: a masked sum is of one model "
            "and the keys of one round, so nothing is carried into the next; set it to 0, or use "
            "secagg=none"
        )
    size = buffering.size or max(plan.cohort.quorum, LEAST_COHORT)
    if size < (least := least_threshold(asked, plan.secagg.colluders)):
        of = f"of {asked} sites" if asked else "of these sites"
        yield (
            f"a buffer of {size} with secagg: only sums {of} with {least} or more in them are "
            f"opened, raise strategy.buffer to {least}, or ask fewer"
        )


def _reducer(plan: Plan) -> Iterator[str]:
    reducer, quorum = plan.strategy.reducer, plan.cohort.quorum
    if 0 < quorum < reducer.least:
        yield (
            f"cohort.quorum {quorum} with reducer {type(reducer).__name__}, which needs "
            f"{reducer.least} updates at its settings: raise the quorum, lower "
            "strategy.reducer.f, or choose a reducer that needs fewer"
        )
    if root := getattr(reducer, "root", ""):
        yield from _rooted(type(reducer).__name__, root, plan.cohort)


def _rooted(name: str, root: str, cohort: Cohort) -> Iterator[str]:
    """Say what would leave the site out by which a reducer judges the others."""
    if cohort.sites and root not in cohort.sites:
        yield (
            f"reducer {name} with root {root}, which is not among cohort.sites: add it there, or "
            "set strategy.reducer.root to one of them"
        )
    if cohort.size and cohort.size != len(cohort.sites):
        yield (
            f"reducer {name} with cohort.size {cohort.size}: its root {root} must answer in each "
            "round, and may not be drawn; set cohort.size=0"
        )


def _privacy(plan: Plan) -> Iterator[str]:
    mode, name = plan.privacy.mode, type(plan.strategy).__name__
    if mode == "none":
        return
    if plan.privacy.shares_noise:
        yield from _shared_noise(plan)
    if measures(plan.strategy):
        yield (
            f"strategy {name} with {mode} privacy: its sites report exact "
            "numbers made of rows, which no noise hides; use strategy=fedavg, or privacy=none"
        )
    if scores_exact(plan.strategy) and _evaluates(plan):
        yield (
            f"evaluation with strategy {name} and {mode} privacy: sites score models of their own, "
            "made of rows without noise; set evaluation.at_end=false and every=0, or privacy=none"
        )
    if plan.privacy.rounds != plan.rounds:
        yield (
            f"privacy.rounds {plan.privacy.rounds} is not rounds {plan.rounds}: "
            "noise is set for exactly the rounds that run, make them equal"
        )
    yield from _by_site(plan) if unit_of(mode) == "site" else _by_record(plan)


def _by_site(plan: Plan) -> Iterator[str]:
    reducer, name, mode = plan.strategy.reducer, type(plan.strategy).__name__, plan.privacy.mode
    if not isinstance(reducer, WeightedMean):
        yield (
            f"reducer {type(reducer).__name__} with {mode} privacy: what one site can do to "
            "it is not bounded by a clip; use strategy.reducer=weighted-mean, or privacy=record"
        )
    if needs_means(plan.strategy):
        yield (
            f"strategy {name} with {mode} privacy: its sites report slots, which the clip "
            "does not bound; use strategy=fedavg, fedprox or fedadam"
        )
    if _evaluates(plan):
        yield (
            f"evaluation with {mode} privacy: a site's scores would leave without noise; set "
            "evaluation.at_end=false and every=0, and score the model on rows that are nobody's"
        )


def _by_record(plan: Plan) -> Iterator[str]:
    mode = plan.privacy.mode
    if contrasts(plan.strategy):
        yield (
            f"strategy {type(plan.strategy).__name__} with {mode} privacy: its sites add to the "
            "loss what no row's part in is bounded; use strategy=fedavg or fedprox, or privacy=none"
        )
    if plan.training.epochs:
        yield (
            f"training.epochs {plan.training.epochs} with {mode} privacy: the number of passes "
            "depends on private rows, set training.steps instead"
        )
    if _evaluates(plan) and plan.privacy.evaluation_epsilon == 0:
        yield (
            f"evaluation with {mode} privacy and privacy.evaluation_epsilon 0: scores are made of "
            "private rows, set evaluation_epsilon above 0 or evaluation.at_end=false and every=0"
        )


def _shared_noise(plan: Plan) -> Iterator[str]:
    """Say what keeps a sum's noise, of which each site adds a share, from being whole."""
    sharers, quorum = plan.privacy.sharers, plan.cohort.quorum
    if in_turn(plan.strategy):
        yield (
            f"privacy.mode {plan.privacy.mode} with strategy {type(plan.strategy).__name__}: sites "
            "share the noise of a sum, and here each update goes alone; use privacy=record"
        )
    elif sharers > quorum:
        yield (
            f"privacy.sharers {sharers} is above cohort.quorum {quorum}: a round of so few sites "
            "would lack noise, raise the quorum or lower sharers, which adds noise"
        )
    if plan.privacy.mode == "record_distributed":
        yield from _one_step(plan)


def _one_step(plan: Plan) -> Iterator[str]:
    """Say what keeps a round from being one plain step, whose noise all sites know."""
    strategy = plan.strategy
    if plan.training.steps != 1 or plan.training.batch_size:
        yield (
            f"training.steps {plan.training.steps} and batch_size {plan.training.batch_size} in "
            "mode record_distributed: each step is a round over all rows, set steps=1 and "
            "batch_size=0"
        )
    name, reducer = type(strategy).__name__, strategy.reducer
    if not reducer.linear:
        yield (
            f"reducer {type(reducer).__name__} in mode record_distributed: single updates lack "
            "noise, so nothing but their sum may be looked at; use reducer=weighted-mean"
        )
    if rule_of(strategy) != "plain":
        yield (
            f"strategy {name} in mode record_distributed: its sites bend gradients or report "
            "more than their sum, for which no noise is set; use strategy=fedavg"
        )


def _secagg(plan: Plan) -> Iterator[str]:
    settings, strategy = plan.secagg, plan.strategy
    if not settings.is_on:
        return
    if not strategy.reducer.linear:
        yield (
            f"secagg with reducer {type(strategy.reducer).__name__}, which looks at single "
            "updates: use reducer=weighted-mean, or secagg=none"
        )
    if measures(strategy) and not is_bounded(strategy):
        yield (
            f"secagg with strategy {type(strategy).__name__}, whose sites report what they make "
            "of their loss, for which there is no clip: use strategy=fedavg, or secagg=none"
        )
    yield from _too_few(plan)
    if _evaluates(plan) and not settings.scores:
        yield (
            "evaluation with secagg and no secagg.scores: no site's own scores are seen, name "
            "those whose sums are wanted, or set evaluation.at_end=false and every=0"
        )
    unseen = sorted({gate.metric for gate in plan.gates} - {*settings.scores})
    if settings.scores and unseen:
        yield f"gates on {', '.join(unseen)} with secagg: name them in secagg.scores"
    if plan.wire.up != "exact":
        yield (
            f"wire.up {plan.wire.up} with secagg: masked words cannot be packed, and what is "
            "rounded is not what is masked; use wire.up=exact"
        )
    if plan.privacy.mode == "site_central":
        yield (
            f"privacy.mode {plan.privacy.mode} with secagg: its noise is not made for masked sums "
            "here; use privacy=record or patient, or secagg=none"
        )
    if plan.privacy.shares_noise:
        yield from _masked_shares(plan)


def _too_few(plan: Plan) -> Iterator[str]:
    """Say what keeps a masked sum from hiding what it is made of."""
    buffering = buffering_of(plan.strategy)
    if in_turn(plan.strategy) or (buffering and buffering.size == 1):
        yield (
            f"secagg with strategy {type(plan.strategy).__name__}: a round is one site's update, "
            "and there is no sum to hide it in; use strategy=fedavg, or secagg=none"
        )
    elif 0 < plan.cohort.quorum < LEAST_COHORT:
        yield (
            f"cohort.quorum {plan.cohort.quorum} with secagg: of a sum of two each knows the "
            f"other's update, raise it to {LEAST_COHORT} or more"
        )


def _masked_shares(plan: Plan) -> Iterator[str]:
    """Say what a masked sum whose noise is shared cannot have, beside `_shared_noise`."""
    settings, training, sharers = plan.secagg, plan.training, plan.privacy.sharers
    honest = plan.cohort.quorum - settings.colluders
    if settings.colluders and sharers > honest:
        yield (
            f"privacy.sharers {sharers} is above cohort.quorum {plan.cohort.quorum} less "
            f"secagg.colluders {settings.colluders}, who know their own shares: lower sharers to "
            f"{honest}, or raise the quorum"
        )
    if unit_of(plan.privacy.mode) == "site":
        return  # a site weighs 1, and its update is a few noises long at most
    if training.weight_decay:
        yield (
            f"training.weight_decay {training.weight_decay} with secagg in mode "
            "record_distributed: what is summed are gradients alone, set it to 0"
        )
    try:
        step = abs(grain_of(training, plan.privacy)) / training.lr
    except ConfigError:
        return  # of steps or epsilon, and told as such
    cohort = plan.cohort
    sites = cohort.size or len(cohort.sites) or cohort.quorum
    if (most := sites * settings.weight_cap * plan.privacy.clip / step) > _ROOM:
        yield (
            f"secagg.weight_cap {settings.weight_cap:g} at {sites} sites: sums of up to {most:.3g} "
            "steps of the noise's grid leave the ring of 2^32, lower it or privacy.epsilon"
        )


def _scoring(plan: Plan) -> Iterator[str]:
    if plan.evaluation.every < 0:
        yield f"evaluation.every {plan.evaluation.every}: use 0 for never, or a number of rounds"
    if plan.gates and not plan.evaluation.at_end:
        metrics = ", ".join(sorted({gate.metric for gate in plan.gates}))
        yield f"gates on {metrics} without a last evaluation: set evaluation.at_end=true"


def _wire(plan: Plan) -> Iterator[str]:
    if is_coarse(plan.wire.up) and keeps_deltas(plan.strategy):
        yield (
            f"wire.up {plan.wire.up} with strategy {type(plan.strategy).__name__}: its sites "
            "remember their deltas as they were before rounding, and fall out of step with the "
            "coordinator; use wire.up=zstd or exact"
        )
    if is_coarse(plan.wire.down) and needs_exact_model(plan.strategy):
        yield (
            f"wire.down {plan.wire.down} with strategy {type(plan.strategy).__name__}: its sites "
            "would look at a rounded model, and what they report belongs to the exact one; use "
            "wire.down=zstd, delta or exact"
        )
    by_site = plan.privacy.mode != "none" and unit_of(plan.privacy.mode) == "site"
    if is_coarse(plan.wire.up) and (by_site or plan.privacy.shares_noise):
        yield (
            f"wire.up {plan.wire.up} with {plan.privacy.mode} privacy: rounding moves an update "
            "after its norm was bounded, or shares of noise; use wire.up=zstd or exact"
        )


def _evaluates(plan: Plan) -> bool:
    return plan.evaluation.at_end or plan.evaluation.every > 0
