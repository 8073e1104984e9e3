"""Speakers of Shakespeare's plays, each with what they say.

Data: "tinyshakespeare" of Karpathy's char-rnn, 40,000 lines of public domain text: speeches parted
by blank lines, each under a line with the speaker's name and a colon. Two plays that share a
name ("First Citizen") share a speaker.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from simulations.download import Source, find
from simulations.shakespeare.recipe import STRIDE, WINDOW, windows

SOURCE = Source(
    "tinyshakespeare/input.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ("86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",),
)


@dataclass(frozen=True)
class Speakers:
    """A site for each speaker of at least `least` rows; the last fifth of the words scores.

    Split by time as McMahan et al. 2017 do. `together` puts all speakers into one site.
    """

    least: int = 500
    held_out: float = 0.2
    together: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ConfigError(f"population.held_out {self.held_out}: a share between 0 and 1")

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Return the speakers' rows; `data` is not needed, and nothing is random."""
        shortest = max(self.least * STRIDE, 2 * round((WINDOW + STRIDE) / self.held_out))
        chosen = {who: said for who, said in speeches(find(SOURCE)).items() if len(said) > shortest}
        if not chosen:
            raise ConfigError(f"population.least {self.least}: no speaker has so many rows")
        texts = {"all": "".join(chosen.values())} if self.together else chosen
        return {SiteId(_name(who)): self._divide(said) for who, said in texts.items()}

    def _divide(self, said: str) -> Holding:
        cut = round(len(said) * (1 - self.held_out))
        return Holding(windows(said[:cut]), windows(said[cut:]))


def speeches(path: Path) -> Mapping[str, str]:
    """Return all that each speaker says, in the order of first words."""
    said: dict[str, list[str]] = {}
    who = ""
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        head, _, rest = block.partition("\n")
        if head.endswith(":"):
            who, words = head[:-1], rest
        else:
            words = block  # the speech goes on after a blank line
        if words.strip():
            said.setdefault(who, []).append(words.strip("\n") + "\n")
    return {speaker: "".join(parts) for speaker, parts in said.items() if speaker}


def _name(speaker: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", speaker.lower()).strip("-")
