"""A privacy card says what was asked, what it cost, for whom, and what is not protected."""

from __future__ import annotations

from fedml.protocol.messages import Privacy
from fedml.protocol.secagg import Secagg
from fedml.releases.card import card

PRIVATE = Privacy("record", 3.0, 1e-5, rounds=20, evaluation_epsilon=0.5)


def test_a_card_under_record_privacy_is_one_paragraph_with_all_its_numbers() -> None:
    text = card("heart/2", PRIVATE, 20, {"bern": 2.99, "oslo": 1.5})
    assert text.count("\n") == 1 and text.endswith("\n")
    for word in (
        "heart/2", "20 rounds at 2 sites", "each training row", "the coordinator",
        "epsilon 3, delta 1e-05", "unit one record", "adjacency add/remove one",
        "cost epsilon 1.500 to 2.990", "a held-out row epsilon 0.5", "Not protected",
    ):  # fmt: skip
        assert word in text


def test_a_card_without_privacy_promises_nothing() -> None:
    text = card("heart/2", Privacy(), 3, {"bern": 0.0})
    assert text.startswith("heart/2, trained in 3 rounds at 1 site. ")
    assert "no epsilon holds" in text and "differential privacy" not in text


def test_a_card_of_a_trusting_plan_says_whom_it_trusts() -> None:
    trusting = Privacy("site_central", 2.0, 1e-5, clip=0.5, rounds=4)
    text = card("heart/2", trusting, 4, {"bern": 1.99})
    for word in (
        "each site's data as a whole", "not against the coordinator", "unit one site",
        "epsilon 2, delta 1e-05", "norm 0.5", "No amplification", "cost epsilon 1.990",
    ):  # fmt: skip
        assert word in text
    assert "each training row" not in text


def test_a_card_of_sites_that_share_noise_says_who_must_not_see_one_update() -> None:
    sharing = Privacy("site_distributed", 2.0, 1e-5, clip=0.5, rounds=4, sharers=4)
    text = card("heart/2", sharing, 4, {"bern": 1.99})
    for word in (
        "each site's data as a whole", "the coordinator included, but not against whoever sees a",
        "as 4 sites add it", "unit one site", "epsilon 2, delta 1e-05", "norm 0.5", "No amplif",
    ):  # fmt: skip
        assert word in text
    assert "trusted to add" not in text


def test_a_card_of_masked_sums_says_what_the_coordinator_saw_and_what_a_sum_still_tells() -> None:
    masked = card("heart/2", Privacy(), 4, {"bern": 0.0}, Secagg("sa1", colluders=2), 7)
    for word in (
        "masked (sa1)", "even with the help of 2 sites, saw no single site's", "at least 5 sites",
        "Whoever sees a sum of updates", "no epsilon holds", "Masks do not hide what a sum",
    ):  # fmt: skip
        assert word in masked
    assert "sees a site's update" not in masked
    alone = card("heart/2", PRIVATE, 4, {"bern": 2.9}, Secagg("sa1"), 3)
    assert "without a site's help" in alone and "at least 3 sites" in alone
    assert "mask" not in card("heart/2", Privacy(), 4, {"bern": 0.0}, Secagg(), 3)


def test_a_card_claims_no_more_than_the_plan_asked() -> None:
    mild = card("heart/2", Privacy("record", 8.0, 1e-3, rounds=2), 2, {"bern": 7.99})
    assert "epsilon 8, delta 0.001" in mild and "no scores of held-out rows left" in mild
    assert "epsilon 3" not in mild
