"""What sites and the coordinator say to each other in secure aggregation SA1, as values.

M0 to M8 of the protocol, in the order in which they are sent. Each carries the context of its
round, so none can be taken for another's. What a site sends here reveals nothing of its update
but what `Unmasking` does, and that only together with `threshold` sites.

Each value checks its shape at birth and raises `ConfigError`; signatures and membership are
checked by the session that takes the message.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from fedml.durable import dump_json
from fedml.errors import ConfigError, MalformedMessage
from fedml.protocol.messages import Privacy, RecipeId, SiteId, Training, check_id
from fedml.records import from_record, to_record

KEY = DIGEST = 32  # bytes
SIGNATURE = 64
SHARE = 33  # a number below 2^256 + 297
BOX = 12 + 2 * SHARE + 16  # nonce, a share of each secret, tag


def check_length(what: str, value: bytes, length: int) -> None:
    """Raise `ConfigError` unless `value` has `length` bytes."""
    if len(value) != length:
        raise ConfigError(f"{what}: {len(value)} bytes, expected {length}")


def _check_all(what: str, values: Mapping[SiteId, bytes], length: int) -> None:
    for site, value in values.items():
        check_length(f"{what} of {check_id('site', site)}", value, length)


@dataclass(frozen=True)
class Secagg:
    """How a run's sums are masked, in mode `sa1`; every site of a round has the same.

    `clip` bounds each number of an update: what is beyond is clipped, and the larger it is, the
    coarser the sum, by steps of about clip * sites / 2^31. `weight_cap` is the largest weight of
    a site. `colluders` is how many sites are assumed to help the coordinator. `metrics` bounds
    the training metrics that are wanted, by name, and `scores` names the scores of evaluations:
    all others stay at the sites. `patience` is how many seconds an exchange of keys, consents or
    shares may take.
    """

    mode: Literal["none", "sa1"] = "none"
    clip: float = 1.0
    weight_cap: float = 1.0
    colluders: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    scores: tuple[str, ...] = ()
    patience: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scores", tuple(self.scores))
        if self.mode not in ("none", "sa1"):
            raise ConfigError(f"secagg.mode {self.mode!r}: use 'none' or 'sa1'")
        positive = {"clip": self.clip, "weight_cap": self.weight_cap, "patience": self.patience}
        positive |= {f"metrics.{name}": bound for name, bound in self.metrics.items()}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise ConfigError(f"secagg.{name} {value}: must be above 0")
        if self.colluders < 0:
            raise ConfigError(f"secagg.colluders {self.colluders}: 0 or more")

    @property
    def is_on(self) -> bool:
        """True if sums are masked."""
        return self.mode != "none"


@dataclass(frozen=True)
class Part:
    """A stretch of the masked vector: `size` numbers within +-`clip`; what is beyond is clipped.

    A `fine` part takes two words a number, for a resolution of about 2^-50 of its range: meant
    for the few numbers of metrics and counts. A `whole` part is of whole numbers, which go into
    the sum as they are, modulo 2^32: neither weighed nor clipped, so its `clip` says 1.
    """

    name: str
    size: int
    clip: float
    fine: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if self.whole and (self.fine or self.clip != 1):
            raise ConfigError(f"part {self.name!r}: whole numbers are not fine, and have clip 1")
        if self.size < 0 or not 0 < self.clip < math.inf:
            raise ConfigError(
                f"part {self.name!r}: size {self.size}, clip {self.clip}; the clip is above 0"
            )


@dataclass(frozen=True)
class Masking:
    """What an order of a masked round says of it, beside what every order does."""

    attempt: int
    cohort: tuple[SiteId, ...]
    threshold: int
    parts: tuple[Part, ...]
    settings: Secagg

    def to_json(self) -> str:
        """Return canonical JSON, as it travels in `Assignment.masking`.

        `whole` is written where it is true: sites from before do not know the word.
        """
        record = cast(dict[str, object], to_record(self))
        record["parts"] = [_record(part) for part in self.parts]
        return dump_json(record).decode()

    @staticmethod
    def from_json(text: str) -> Masking:
        """Return what `to_json` wrote; raises `MalformedMessage`."""
        try:
            return from_record(Masking, json.loads(text), "masking")
        except (ValueError, RecursionError, ConfigError) as error:
            raise MalformedMessage(f"masking: {error}") from error


def _record(part: Part) -> object:
    record = cast(dict[str, object], to_record(part))
    if not part.whole:
        del record["whole"]
    return record


def about(
    recipe: RecipeId,
    training: Training,
    privacy: Privacy,
    rule: str,
    settings: Mapping[str, float],
    secagg: Secagg,
) -> str:
    """Return, as canonical text, what else must be the same at all sites of a masked round."""
    floats = {name: float(value) for name, value in settings.items()}
    parts = (recipe, training, privacy, rule, floats, secagg)
    return dump_json([to_record(part) for part in parts]).decode()


@dataclass(frozen=True)
class Advert:
    """M0, from a site: its two X25519 keys for this round, signed with its pinned identity."""

    context: bytes
    site: SiteId
    box_key: bytes  # others encrypt shares to it
    mask_key: bytes  # pairwise masks come from it
    signature: bytes

    def __post_init__(self) -> None:
        check_id("site", self.site)
        check_length("context", self.context, DIGEST)
        check_length("box key", self.box_key, KEY)
        check_length("mask key", self.mask_key, KEY)
        check_length("signature", self.signature, SIGNATURE)


@dataclass(frozen=True)
class Adverts:
    """M1, to each site: the adverts of all that sent one."""

    context: bytes
    adverts: tuple[Advert, ...]

    def __post_init__(self) -> None:
        check_length("context", self.context, DIGEST)


@dataclass(frozen=True)
class Shares:
    """M2, from a site: for each other site a box that only it can open, and a commitment.

    A box holds shares of the seed of the site's own mask and of its private mask key.
    """

    context: bytes
    site: SiteId
    boxes: Mapping[SiteId, bytes]
    commitment: bytes  # to the seed, so that a wrong one is noticed

    def __post_init__(self) -> None:
        check_id("site", self.site)
        check_length("context", self.context, DIGEST)
        check_length("commitment", self.commitment, DIGEST)
        _check_all("box", self.boxes, BOX)


@dataclass(frozen=True)
class Boxes:
    """M3, to a site: the boxes made for it, by sender; its masks are for these and no others."""

    context: bytes
    boxes: Mapping[SiteId, bytes]

    def __post_init__(self) -> None:
        check_length("context", self.context, DIGEST)
        _check_all("box", self.boxes, BOX)


@dataclass(frozen=True)
class Masked:
    """M4, from a site: its masked vector is there; the words travel apart, as a blob."""

    context: bytes
    site: SiteId

    def __post_init__(self) -> None:
        check_id("site", self.site)
        check_length("context", self.context, DIGEST)


@dataclass(frozen=True)
class Survivors:
    """M5, to each site that is in the sum: whose vectors are."""

    context: bytes
    sites: tuple[SiteId, ...]

    def __post_init__(self) -> None:
        check_length("context", self.context, DIGEST)
        for site in self.sites:
            check_id("site", site)


@dataclass(frozen=True)
class Consent:
    """M6, from a site: its signature under the survivors that it was told, and under no others."""

    context: bytes
    site: SiteId
    signature: bytes

    def __post_init__(self) -> None:
        check_id("site", self.site)
        check_length("context", self.context, DIGEST)
        check_length("signature", self.signature, SIGNATURE)


@dataclass(frozen=True)
class Consents:
    """M7, to each site in the sum: signatures of enough sites under the same survivors."""

    context: bytes
    signatures: Mapping[SiteId, bytes]

    def __post_init__(self) -> None:
        check_length("context", self.context, DIGEST)
        _check_all("signature", self.signatures, SIGNATURE)


@dataclass(frozen=True)
class Unmasking:
    """M8, from a site: shares of survivors' seeds and of the others' mask keys, never of both."""

    context: bytes
    site: SiteId
    seeds: Mapping[SiteId, bytes]
    keys: Mapping[SiteId, bytes]

    def __post_init__(self) -> None:
        check_id("site", self.site)
        check_length("context", self.context, DIGEST)
        _check_all("share", self.seeds, SHARE)
        _check_all("share", self.keys, SHARE)


FromSite = Advert | Shares | Masked | Consent | Unmasking
ToSite = Adverts | Boxes | Survivors | Consents
