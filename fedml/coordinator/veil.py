"""Between a masked round and the wire: its messages in envelopes, and words in their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedml.errors import MalformedMessage, MalformedUpdate
from fedml.protocol import codec
from fedml.protocol.messages import SecaggSaid, SecaggTold, SiteId, TaskId, Trained
from fedml.protocol.secagg import (
    Advert,
    Adverts,
    Boxes,
    Consent,
    Consents,
    FromSite,
    Masked,
    Masking,
    Secagg,
    Shares,
    Survivors,
    ToSite,
    Unmasking,
)
from fedml.rounds.masked import Said
from fedml.secagg import Terms

_WORD = 4  # bytes


def masking(terms: Terms, settings: Secagg) -> str:
    """Return what an order says of its masked round."""
    parts = (terms.attempt, terms.cohort, terms.threshold, terms.parts, settings)
    return Masking(*parts).to_json()


def told(task: TaskId, message: ToSite) -> SecaggTold:
    """Return a message to a site in its envelope."""
    data = codec.encode(message)
    match message:
        case Adverts():
            return SecaggTold(task, "adverts", data)
        case Boxes():
            return SecaggTold(task, "boxes", data)
        case Survivors():
            return SecaggTold(task, "survivors", data)
        case Consents():
            return SecaggTold(task, "consents", data)


def said(site: SiteId, event: SecaggSaid) -> Said:
    """Return a site's message; raises `MalformedMessage`, also at one in another's name."""
    kinds: dict[str, type[Advert | Shares | Consent | Unmasking]] = {
        "advert": Advert,
        "shares": Shares,
        "consent": Consent,
        "unmasking": Unmasking,
    }
    message: FromSite = codec.decode(kinds[event.word], event.data)
    if message.site != site:
        raise MalformedMessage(f"it is in the name of {message.site}")
    return Said(event.task, message)


def masked(site: SiteId, answer: Trained, path: Path, terms: Terms) -> Said:
    """Return a site's masked words, mapped from the file at `path`."""
    if answer.update.size != terms.grid.length * _WORD:
        raise MalformedUpdate(
            f"{answer.update.size} bytes of masked words, expected {terms.grid.length * _WORD}"
        )
    words = np.memmap(path, np.uint32, "r")
    message = Masked(terms.context, site)
    return Said(answer.task, message, words, answer.update.digest, answer.epsilon)
