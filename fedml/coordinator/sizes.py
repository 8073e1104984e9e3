"""How much a site may hand in, by what it was asked for."""

from __future__ import annotations

from fedml.protocol.messages import Assignment
from fedml.protocol.secagg import Masking
from fedml.secagg import Grid

_REPLY = 2**28  # bytes that a Flower app's reply may have over twice the message's


def largest_update(order: Assignment) -> int:
    """Return how many bytes an update may have: twice the model's, and a little.

    Algorithms report slots as large as the model at most once. Masked words are as many as the
    round's terms say. What a Flower app replies has nothing to do with what it is asked.
    """
    if order.app:
        return 2 * order.model.size + _REPLY
    if not order.masking:
        return 2 * order.model.size + 2**20
    masking = Masking.from_json(order.masking)
    return 4 * Grid(len(masking.cohort), masking.parts).length
