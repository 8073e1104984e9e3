"""FedAsync's proximal term against its formula, on quadratics; the rest is where rounds are."""

from __future__ import annotations

import numpy as np
import pytest

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.strategies import RULES, Aggregate, FedAsync
from tests.strategies.quadratics import gradient, params

ALPHA, MU, LR, STEPS = 0.6, 0.7, 0.1, 5


def local(strategy: FedAsync, site: int, sent: Params) -> Params:
    """Where a site's steps end, bent by the rule that the strategy's brief names."""
    brief = strategy.brief(strategy.start(sent))
    here = sent
    for _ in range(STEPS):
        plain = params(gradient(site, here["w"].numpy()))
        here = here - RULES[brief.rule].gradient(brief, {}, here, plain) * LR
    return here


def test_it_is_algorithm_1_of_xie_2019_with_its_proximal_term() -> None:
    strategy, w = FedAsync(alpha=ALPHA, mu=MU), np.array([2.0, -1.0, 0.5])
    state = strategy.start(params(w))
    for site in (0, 2, 1):
        x = w
        for _ in range(STEPS):
            x = x - LR * (gradient(site, x) + MU * (x - w))
        w = (1 - ALPHA) * w + ALPHA * x
        delta = local(strategy, site, state.params) - state.params
        state = strategy.advance(state, Aggregate(delta, {}, weight=1.0, count=1))
        np.testing.assert_allclose(state.params["w"].numpy(), w, rtol=0, atol=1e-12)


def test_without_mu_its_brief_is_plain() -> None:
    brief = FedAsync().brief(FedAsync().start(params(np.ones(3))))
    assert (brief.rule, brief.settings) == ("plain", {})
    with pytest.raises(ConfigError, match=r"fedasync.mu -1.0: must be 0 or more"):
        FedAsync(mu=-1.0)
