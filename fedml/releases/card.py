"""The privacy card of a version: in one paragraph, what is protected, and what is not."""

from __future__ import annotations

from collections.abc import Mapping

from fedml.privacy.accounting import ADJACENCY
from fedml.protocol.messages import Privacy
from fedml.protocol.secagg import Secagg

_BARE = Secagg()
_ROWS = "each training row of each site,"
CARD = "privacy.txt"  # in a bundle, signed with the rest
_ALWAYS = (
    "Not protected in any case: that a site takes part, its public row counts, the plan, and how "
    "long the work took; what other runs and other releases tell of the same rows; and the choice "
    "of settings, if earlier runs on these rows led to it."
)


def card(
    what: str,
    privacy: Privacy,
    rounds: int,
    spent: Mapping[str, float],
    secagg: Secagg = _BARE,
    quorum: int = 0,
) -> str:
    """Return the card of `what`, a version's name, made in `rounds` rounds under `privacy`.

    `spent` is what each site's own ledger said that the run had cost, at the plan's delta. Where
    `secagg` is on, at least `quorum` sites were in each sum.
    """
    head = f"{what}, trained in {_count(rounds, 'round')} at {_count(len(spent), 'site')}."
    match privacy.mode:
        case "none":
            seen, exact = ("a site's update", "Scores and counts")
            if secagg.is_on:
                seen, exact = ("a sum of updates", "Sums of scores and of counts")
            body = (
                "Rows stayed at their sites, and nothing more is promised: no epsilon holds for "
                f"this model. Whoever sees {seen}, as the coordinator does, or the model may learn "
                f"single rows from it. {exact} of rows are exact."
            )
        case "site_central":
            body = f"{_of_sites(privacy, _TRUSTING)} {_cost(privacy, spent)}"
        case "site_distributed":
            whom = _AMONG.format(sharers=privacy.sharers)
            body = f"{_of_sites(privacy, whom)} {_cost(privacy, spent)}"
        case "record_distributed":
            body = f"{_sharing(privacy)} {_cost(privacy, spent)} {_gaps(privacy)}"
        case "record" | "patient":
            body = f"{_promise(privacy)} {_cost(privacy, spent)} {_gaps(privacy)}"
    masks = f" {_masks(secagg, quorum)}" if secagg.is_on else ""
    return f"{head} {body}{masks} {_ALWAYS}\n"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _masks(secagg: Secagg, quorum: int) -> str:
    helped = _count(secagg.colluders, "site")
    alone = f"even with the help of {helped}" if secagg.colluders else "without a site's help"
    return (
        f"Updates, weights and scores were masked ({secagg.mode}): the coordinator, {alone}, saw "
        "no single site's, and only sums of them, each with at least "
        f"{quorum - secagg.colluders} sites that did not help it. Masks do not hide what a sum "
        "itself tells."
    )


def _promise(privacy: Privacy) -> str:
    patients = privacy.mode == "patient"
    whom = "each patient of each site, with all training rows there," if patients else _ROWS
    return (
        f"Protected is {whom} against everybody who sees the model or the "
        "sites' updates, the coordinator and the other sites included: "
        f"(epsilon {privacy.epsilon:g}, delta {privacy.delta:g})-differential privacy over the "
        f"whole run, unit one {privacy.mode}, adjacency {ADJACENCY}. Each site clips and adds the "
        "noise itself, and its own ledger charged it before anything left."
    )


def _sharing(privacy: Privacy) -> str:
    return (
        f"Protected is {_ROWS} against everybody who sees the model or the "
        "sums of all sites' updates, but not against whoever sees a single site's update, which "
        f"has a share of the noise alone, as {privacy.sharers} sites add it: "
        f"(epsilon {privacy.epsilon:g}, delta {privacy.delta:g})-differential privacy over the "
        f"whole run, unit one record, adjacency {ADJACENCY}."
    )


_TRUSTING = (
    "everybody who sees the model, the other sites included, but not against the coordinator, "
    "which sees each site's exact update and is trusted to add the noise before anybody else sees "
    "their sum"
)
_AMONG = (
    "everybody who sees the model or the masked sums of all sites' updates, the coordinator "
    "included, but not against whoever sees a single site's update, which has a share of the noise "
    "alone, as {sharers} sites add it"
)


def _of_sites(privacy: Privacy, whom: str) -> str:
    return (
        f"Protected is each site's data as a whole, against {whom}: "
        f"(epsilon {privacy.epsilon:g}, delta {privacy.delta:g})-differential privacy over the "
        f"whole run, unit one site, adjacency {ADJACENCY}, where a removed site's update is zero. "
        f"Each site clips its update to norm {privacy.clip:g} itself, and its own ledger charged "
        "it before it left. No amplification by sampling is claimed; no scores left the sites."
    )


def _cost(privacy: Privacy, spent: Mapping[str, float]) -> str:
    if not spent:
        return "No site told what its ledger was charged."
    least, most = min(spent.values()), max(spent.values())
    told = f"{most:.3f}" if f"{least:.3f}" == f"{most:.3f}" else f"{least:.3f} to {most:.3f}"
    return f"The run cost epsilon {told} by the sites' ledgers, at delta {privacy.delta:g}."


def _gaps(privacy: Privacy) -> str:
    scores = (
        f"each evaluation cost a held-out row epsilon {privacy.evaluation_epsilon:g}, delta 0"
        if privacy.evaluation_epsilon
        else "no scores of held-out rows left the sites"
    )
    alone = "" if privacy.mode == "patient" else "several rows, or with "
    return (
        f"Of held-out rows, which are others, {scores}. A person with {alone}rows at several "
        "sites is protected less: by about that many times epsilon, and a larger delta. Replacing "
        "one costs up to twice what adding or removing it does."
    )
