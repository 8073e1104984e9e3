"""Recipes: what is learnt, written once and installed at every site, never sent.

A recipe is found by name: among ours, among installed packages (entry points of the group
`fedml.recipes`), or in an operator's own file, registered as `name=/path/file.py:Class`. Both
ends compare the SHA-256 of its source, which is read without importing it; what that file
imports in turn is not part of the digest.

No torch here at run time: the site's daemon lists recipes and never loads one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from fedml.errors import ConfigError, Refused
from fedml.installed import Offer, digest_of, offers
from fedml.protocol.messages import RecipeId

if TYPE_CHECKING:
    from torch import Tensor, nn

BUILT_IN: Mapping[str, str] = {
    "breast_cancer": "fedml.recipes.breast_cancer:BreastCancer",
    "breast_cancer_clusters": "fedml.recipes.breast_cancer_clusters:BreastCancerClusters",
    "breast_cancer_trees": "fedml.recipes.breast_cancer_trees:BreastCancerTrees",
    "heart_disease": "fedml.recipes.heart_disease:HeartDisease",
}
_NONE: Mapping[str, str] = {}


@dataclass(frozen=True)
class Rows:
    """A site's rows: inputs `x` [n, ...] and targets `y` [n, ...], without NaN or infinity.

    `groups` [n], integers, says whose each row is, where privacy may be asked for by person;
    they never leave the site.
    """

    x: Tensor
    y: Tensor
    groups: Tensor | None = None

    def __post_init__(self) -> None:
        if self.x.ndim < 1 or self.y.ndim < 1 or len(self.x) != len(self.y):
            raise ConfigError(
                f"inputs {list(self.x.shape)} and targets {list(self.y.shape)}: "
                "both need one entry a row"
            )
        if self.groups is not None:
            _check_groups(self.groups, len(self.x))
        for name, values in (("inputs", self.x), ("targets", self.y)):
            if not is_finite(values):
                bad = (~values.isfinite()).reshape(len(values), -1).any(dim=1).nonzero()
                raise ConfigError(f"{name}: row {int(bad[0])} has NaN or infinity; mend the data")

    def __len__(self) -> int:
        return len(self.x)

    def __reduce__(self) -> tuple[type[Rows], tuple[Tensor | None, ...]]:
        parts = (self.x, self.y, self.groups)
        return Rows, tuple(None if part is None else _alone(part) for part in parts)

    def take(self, indices: Sequence[int] | Tensor) -> Rows:
        """Return the rows at `indices`, in that order."""
        groups = None if self.groups is None else self.groups[indices]
        return Rows(self.x[indices], self.y[indices], groups)

    def divide(self, held_out: float, *, seed: int = 0) -> tuple[Rows, Rows]:
        """Return (rows to train on, rows held out), about the share `held_out` in the latter.

        `seed` and a row's own content decide, or its group where there is one, so its part never
        changes with the rows around it or their order: what privacy needs of a split. Equal rows
        stay together, and so does a group. A dataset's seed must stay the same for as long as
        its ledger lives.
        """
        if not 0 <= held_out < 1:
            raise ConfigError(f"held-out share {held_out}: must lie in [0, 1); 0.25 is common")
        x, y = (part.reshape(len(self), -1).cpu().contiguous() for part in (self.x, self.y))
        bound, key = int(held_out * 2**64), str(seed).encode()
        if self.groups is not None:
            x, y = self.groups.long().cpu()[:, None], y[:, :0]
        rows = zip(x.numpy(), y.numpy(), strict=True)
        digests = (hashlib.sha256(b"%b:%b%b" % (key, a.tobytes(), b.tobytes())) for a, b in rows)
        apart = [int.from_bytes(digest.digest()[:8]) < bound for digest in digests]
        kept = [place for place, away in enumerate(apart) if not away]
        return self.take(kept), self.take([place for place, away in enumerate(apart) if away])


def is_finite(values: Tensor) -> bool:
    """Return whether no element is NaN or infinite."""
    if not (values.is_floating_point() and values.numel()):
        return True
    return all(math.isfinite(float(end)) for end in values.aminmax())  # NaN spreads


def _check_groups(groups: Tensor, rows: int) -> None:
    whole = not (groups.is_floating_point() or groups.is_complex() or "bool" in str(groups.dtype))
    if groups.shape != (rows,) or not whole:
        raise ConfigError(
            f"groups {list(groups.shape)} of {groups.dtype}: one integer for each of {rows} rows"
        )


def _alone(values: Tensor) -> Tensor:
    """Return `values` without the larger storage they may be a view of, which pickling copies."""
    return values if values.untyped_storage().nbytes() == values.nbytes else values.clone()


class Recipe(Protocol):
    """What a user writes: a model, its loss, its scores, and how a site's file is read."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the model's outputs, in their order."""

    def build(self) -> nn.Module:
        """Return a fresh model of raw rows: scaling, by public constants, is its first layer.

        Its initial values are the same each time, or drawn from torch's global generator.
        """

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar."""

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return each score by name, one value of [0, 1] a row."""

    def read(self, path: Path) -> Rows:
        """Return the rows of a site's data file; raises `ConfigError` with path and line.

        For privacy mode `patient` they have `groups`: the same integer for all rows of a person,
        in every file of a dataset.
        """

    def example(self, rows: int) -> Tensor:
        """Return synthetic, public input rows, the same each time: never real data."""


def installed(extra: Mapping[str, str] = _NONE) -> tuple[RecipeId, ...]:
    """Return every recipe of this machine, by name.

    `extra` maps names to `file.py:Class`, or to `package.module:Class` of what can be imported.
    """
    return tuple(identify(name, extra) for name in sorted(_catalogue(extra)))


def identify(name: str, extra: Mapping[str, str] = _NONE) -> RecipeId:
    """Return the recipe's name with the SHA-256 of its source file, which is not imported."""
    return RecipeId(name, digest_of(_locate(name, extra).source()))


def load(wanted: RecipeId, extra: Mapping[str, str] = _NONE) -> Recipe:
    """Return the recipe `wanted`; raises `Refused` unless its very source is installed here."""
    offer = _locate(wanted.name, extra)
    source = offer.source()
    digest = digest_of(source)
    if digest != wanted.digest:
        raise Refused(
            f"recipe {wanted.name}: {offer.place()} is {digest[:12]}, the run wants "
            f"{wanted.digest[:12]}; install the version the run was made with"
        )
    kind = offer.load(source)
    try:
        return cast(Recipe, cast(type, kind)())
    except TypeError as error:
        raise ConfigError(f"{offer} does not load: {error}; {offer.remedy}") from error


def _catalogue(extra: Mapping[str, str]) -> Mapping[str, Offer]:
    """Return every recipe by name; raises `ConfigError` where two have the same."""
    found = {name: Offer("recipe", name, target, "fedml") for name, target in BUILT_IN.items()}
    own = (Offer("recipe", name, target) for name, target in extra.items())
    for offer in (*offers("recipe"), *own):
        other = found.setdefault(offer.name, offer)
        if other.target != offer.target:
            name = offer.name
            raise ConfigError(
                f"recipe {name!r} is both {other.target} and {offer.target}; rename one"
            )
    return found


def _locate(name: str, extra: Mapping[str, str]) -> Offer:
    catalogue = _catalogue(extra)
    if name not in catalogue:
        raise Refused(f"no recipe {name!r} here; there are {', '.join(sorted(catalogue))}")
    return catalogue[name]
