"""How a strategy takes updates as they come, without waiting for a cohort.

A step is made of a buffer of updates, from whichever sites were quick. Slower ones go on with the
model that they have; what they send counts in a later step, the less the older that model is.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedml.errors import ConfigError
from fedml.strategies.base import Strategy, check_setting


@dataclass(frozen=True)
class Buffering:
    """Steps are made of `size` updates, 0 for as many as a plan's quorum.

    An update that was made from the model of `staleness` steps ago is multiplied by
    (1 + staleness)^-power; one that would be staler than `most` steps is not waited for. With
    `mixes_models` a step goes towards the sites' models, not along their updates: the way from
    today's model back to the one that an update was made from is part of it.
    """

    size: int = 0
    power: float = 0.5
    most: int = 20
    mixes_models: bool = False

    def check(self, name: str) -> None:
        """Raise `ConfigError`, speaking of strategy `name`, unless these can be settings."""
        if self.size < 0:
            raise ConfigError(
                f"{name}.buffer {self.size}: give the updates that make a step, or 0 for as many "
                "as cohort.quorum"
            )
        check_setting(f"{name}.staleness", self.power)
        if self.most < 0:
            raise ConfigError(f"{name}.max_staleness {self.most}: use 0 or more steps")

    def discount(self, staleness: int) -> float:
        """Return what an update so many steps old is multiplied by: 1 if it is of today."""
        return float((1.0 + staleness) ** -self.power)


def buffering_of(strategy: Strategy) -> Buffering | None:
    """Return how `strategy` takes updates as they come; None if it waits for its cohort."""
    found = getattr(strategy, "buffering", None)
    return found if isinstance(found, Buffering) else None
