"""Tail averaging: a run's model is the mean of the last rounds' models, not the last of them.

Sites go on from the last one. With steps of constant length, noise makes the models wander about
the optimum; their mean wanders less. It is made of what was released, so it costs no privacy.
Source: Rakhlin, Shamir & Sridharan 2012, arXiv:1109.5647, section 5 (alpha-suffix averaging).
"""

from __future__ import annotations

from fedml.params import Params
from fedml.strategies.base import ServerState

LAST = "last"  # the slot of the model that sites go on from


def latest(state: ServerState) -> Params:
    """Return the model that sites train on next."""
    return state.slots.get(LAST, state.params)


def averaged(state: ServerState, moved: Params, start: int) -> ServerState:
    """Return the state after a round that led to `moved`.

    After round t >= `start` its model is (w_start + ... + w_t) / (t - start + 1); with `start` 0,
    or before it, w_t itself. Integers are those of w_t.
    """
    step = state.step + 1
    if start == 0 or step < start:
        return ServerState(moved, step=step)
    count = step - start + 1
    # moved first: zip keeps the integers of its left side
    mean = moved.zip(state.params, lambda new, old: old + (new - old) / count)
    return ServerState(moved if count == 1 else mean, {LAST: moved}, step)
