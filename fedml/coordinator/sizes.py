"""How much a site may hand in, by what it was asked for."""

from __future__ import annotations

from fedml.protocol.messages import Assignment
from fedml.protocol.secagg import Masking
from fedml.secagg import Grid
from fedml.strategies import wide

_REPLY = 2**28  # bytes that a Flower app's reply may have over twice the message's


def largest_update(order: Assignment) -> int:
    """Return how many bytes an update may have: twice the model's, and a little.

    Algorithms report slots as large as the model at most once, and those that are not shaped like
    it come on top. Masked words are as many as the round's terms say. What a Flower app replies
    has nothing to do with what it is asked.
    """
    if order.app:
        return 2 * order.model.size + _REPLY
    if not order.masking:
        return 2 * order.model.size + beside(order)
    masking = Masking.from_json(order.masking)
    return 4 * Grid(len(masking.cohort), masking.parts).length


def beside(order: Assignment) -> int:
    """Return how many bytes may come beside what is shaped like the model; a sum has no more."""
    return 2**20 + sum(layout.bytes for layout in wide(order.rule, order.settings).values())
