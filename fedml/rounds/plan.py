"""A run's plan: everything that was decided before it starts, as one value.

A plan that contradicts itself cannot be built: `Contradiction` lists every conflict at once, each
with the way out. Its canonical JSON is what operators send, journals keep and lineage records.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

from fedml.durable import dump_json
from fedml.errors import ConfigError, Contradiction
from fedml.params import Params
from fedml.privacy.accounting import training_event
from fedml.protocol.messages import Privacy, RecipeId, Scores, SiteId, Training
from fedml.protocol.secagg import Secagg, about
from fedml.protocol.tasks import Brief
from fedml.records import Reader, from_record, to_record
from fedml.rounds.contradictions import contradictions
from fedml.strategies import (
    NoisyMean,
    Reducer,
    ServerState,
    Strategy,
    buffering_of,
    build,
    check_model,
    describe,
)


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Who is asked in a round, how many must answer, and within how many seconds.

    No `sites` means all that can take part; `size` 0 asks all of those, else so many are drawn.
    """

    quorum: int
    deadline: float
    sites: tuple[SiteId, ...] = ()
    size: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple(self.sites))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """When held-out rows score the model: after each `every` rounds (0: never), and at the end."""

    every: int = 0
    at_end: bool = True

    def is_due(self, number: int, *, last: bool) -> bool:
        """True if the model after round `number` is to be scored; `last` if no round follows."""
        return (self.at_end and last) or (self.every > 0 and number % self.every == 0)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """What a score must reach before the model may become a candidate for release."""

    metric: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        bounds = [bound for bound in (self.at_least, self.at_most) if bound is not None]
        if not bounds or not all(math.isfinite(bound) for bound in bounds):
            raise ConfigError(f"gate on {self.metric!r}: set at_least or at_most to a number")

    def objection(self, scores: Scores) -> str:
        """Return why `scores` do not pass, or "" if they do."""
        if self.metric not in scores:
            return f"gate {self.metric}: not measured, there are {sorted(scores)}"
        value = scores[self.metric]
        if self.at_least is not None and not value >= self.at_least:
            return f"gate {self.metric}: {value:.4g} is below {self.at_least:g}"
        if self.at_most is not None and not value <= self.at_most:
            return f"gate {self.metric}: {value:.4g} is above {self.at_most:g}"
        return ""


Down = Literal["exact", "zstd", "delta", "bf16", "bf16+zstd", "bf16+delta"]
Up = Literal["exact", "zstd", "bf16", "bf16+zstd"]


@dataclass(frozen=True, kw_only=True)
class Wire:
    """How a run's models go down to the sites, and how their updates come up.

    With "bf16" each float32 of a model that sites train on, or of an update's delta, is rounded;
    the other words lose nothing. See `docs/wire.md`.
    """

    down: Down = "exact"
    up: Up = "exact"

    def __post_init__(self) -> None:
        for name, word, words in (("down", self.down, Down), ("up", self.up, Up)):
            if word not in get_args(words):
                raise ConfigError(f"wire.{name} {word!r:.60}: use one of {list(get_args(words))}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run: what is trained, by whom, how, under which guarantee, and when it is good enough.

    `dataset` is the name the sites know it by; `parent` a version of `model` to go on from, 0
    for a fresh start. A round is tried `attempts` times; `patience` is how many seconds the run
    waits for enough sites. `seed` fixes cohorts, batch order and dropout, never privacy noise.
    """

    model: str
    recipe: RecipeId
    dataset: str
    strategy: Strategy
    training: Training
    cohort: Cohort
    rounds: int
    privacy: Privacy = field(default_factory=Privacy)
    secagg: Secagg = field(default_factory=Secagg)
    evaluation: Evaluation = field(default_factory=Evaluation)
    gates: tuple[Gate, ...] = ()
    seed: int = 0
    parent: int = 0
    attempts: int = 3
    patience: float = 600.0
    wire: Wire = field(default_factory=Wire)

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", tuple(self.gates))
        object.__setattr__(self, "parent", self.parent or 0)
        self.check()

    def check(self) -> None:
        """Raise `Contradiction` with every reason why this plan cannot run."""
        reasons = contradictions(self)
        if reasons:
            raise Contradiction(reasons)

    def check_served(self) -> None:
        """Raise `Contradiction` if only a simulation may play this plan, which is its own judge."""
        if self.privacy.shares_noise and not self.secagg.is_on:
            raise Contradiction(
                [
                    f"privacy.mode {self.privacy.mode}: a site's update has a share of the noise "
                    "alone, and without secure aggregation a coordinator sees it; use "
                    "secagg=sa1, or another mode, or simulate the run"
                ]
            )

    def start(self, params: Params) -> ServerState:
        """Return the state before the first round, from a model with these parameters.

        Raises `Contradiction` with every reason why the plan cannot work with such a model.
        """
        check_model(self.strategy, params, self.rounds)
        return self.strategy.start(params)

    @property
    def reducer(self) -> Reducer:
        """How updates become one aggregate: as the strategy says, or as privacy demands."""
        if self.privacy.mode != "site_central":
            return self.strategy.reducer
        return NoisyMean(self.privacy.clip, training_event(self.training, self.privacy, 1).noise)

    @property
    def buffer(self) -> int:
        """How many updates make a step, whoever else still works; 0 if all asked are waited for."""
        buffering = buffering_of(self.strategy)
        return (buffering.size or self.cohort.quorum) if buffering else 0

    def to_json(self) -> str:
        """Return canonical JSON: equal plans have equal text, and every default is written.

        But for `wire`, where nothing is packed: coordinators from before do not know the word.
        """
        record = cast(dict[str, object], to_record(self))
        if self.wire == Wire():
            del record["wire"]
        return dump_json({**record, "strategy": describe(self.strategy)}).decode()

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """Return the plan that `to_json` wrote; raises one `ConfigError` with all its problems."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"plan: not JSON ({error})") from error
        readers: dict[object, Reader] = {
            Strategy: lambda raw: build(cast(Mapping[str, object], raw))
        }
        return from_record(Plan, raw, "plan", readers)

    def digest(self) -> str:
        """SHA-256 of `to_json()`, in hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def task_seed(self, number: int, site: SiteId) -> int:
        """Return the seed of a site's batch order in a round; the same for every attempt."""
        text = f"{self.seed}.{number}.{site}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def about_of(plan: Plan, brief: Brief) -> str:
    """Return what all sites of a masked round must have been told alike, beside the model."""
    return about(plan.recipe, plan.training, plan.privacy, brief.rule, brief.settings, plan.secagg)
