"""An alert for whom a robust rule names in every round, and for nobody else."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from fedml.protocol.messages import RunId, SiteId
from fedml.protocol.operations import Counted, Receipt
from fedml.rounds.vigil import ROUNDS, Vigil

SITES = tuple(SiteId(name) for name in ("bern", "kyoto", "lima", "oslo", "quito"))
BERN, KYOTO = SITES[:2]


def receipt(*damped: SiteId, counted: tuple[SiteId, ...] = SITES) -> Receipt:
    return Receipt(
        RunId("line-1"), 1, 1, SITES,
        tuple(Counted(site, 1.0, "ab", 0.0) for site in counted),
        model="cd", damped=dict.fromkeys(damped, "7% of an even share"),
    )  # fmt: skip


def test_five_rounds_in_a_row_make_an_alert_and_each_five_more_renew_it() -> None:
    vigil = Vigil()
    raised = [vigil.take(receipt(BERN)) for _ in range(2 * ROUNDS)]
    assert raised == ([()] * (ROUNDS - 1) + [(BERN,)]) * 2
    assert list(vigil.alerts()) == [
        "bern counted for little in 10 rounds in a row, last because 7% of an even share; "
        "have its data and scaling looked at, or go on without it"
    ]


def test_what_says_nothing_of_a_site_is_passed_over() -> None:
    away = receipt(counted=SITES[1:])
    failed = replace(receipt(), model="")
    scores = replace(receipt(), kind="evaluate")
    krum = receipt(*SITES[1:])  # it leaves out all but one
    vigil = Vigil([receipt(BERN)] * (ROUNDS - 1) + [away, failed, scores, krum])
    assert list(vigil.alerts()) == []
    assert vigil.take(away) == ()
    assert vigil.take(receipt(BERN)) == (BERN,)
    assert Vigil([krum] * 20).rows == {}


@given(
    rounds=st.lists(
        st.tuples(st.sets(st.sampled_from(SITES), min_size=3), st.sets(st.sampled_from(SITES))),
        max_size=30,
    ),
    cut=st.integers(0, 30),
)
def test_rows_are_as_a_look_back_finds_them_also_after_a_restart(
    rounds: list[tuple[set[SiteId], set[SiteId]]], cut: int
) -> None:
    receipts = [receipt(*(d & c), counted=tuple(sorted(c))) for c, d in rounds]
    vigil = Vigil(receipts[:cut])
    for one in receipts[cut:]:
        vigil.take(one)
    telling = [(c, c & d) for c, d in rounds if 2 * len(c & d) < len(c)]
    for site in SITES:
        row = 0
        for counted, damped in reversed(telling):
            if site in counted:
                if site not in damped:
                    break
                row += 1
        assert vigil.rows.get(site, 0) == row
