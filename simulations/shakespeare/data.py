"""Shakespeare's plays, a site for each speaker.

Data: the "tiny Shakespeare" file of Andrej Karpathy's char-rnn, 1.1 MB of plays in the public
domain. A paragraph is a speech: its first line is the speaker's name and a colon. What a speaker
says is strung together; the last part of it is held out, so no scored text comes before training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fedml.errors import ConfigError
from fedml.learning.recipe import Recipe
from fedml.protocol.messages import SiteId
from fedml.simulation.executors.base import Holding
from fedml.simulation.population import Data
from simulations.download import Source, find
from simulations.shakespeare.recipe import LOOK_BACK, encode

SOURCE = Source(
    "tinyshakespeare/input.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ("86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",),
)


@dataclass(frozen=True)
class Speakers:
    """The speakers with at least `least` characters; each keeps at most its first `most`."""

    least: int = 5000
    most: int = 5000
    held_out: float = 0.2

    def deal(self, recipe: Recipe, data: Data | None) -> Mapping[SiteId, Holding]:
        """Return each speaker's rows; `data` is not needed."""
        texts = {name: text[: self.most] for name, text in speeches().items()}
        chosen = {name: text for name, text in texts.items() if len(text) >= self.least}
        if not chosen or not 0 < self.held_out < 1 or self.least * self.held_out <= LOOK_BACK:
            raise ConfigError(
                f"least {self.least}, most {self.most}, held_out {self.held_out}: no speaker has "
                f"text to train on and {LOOK_BACK} characters to score with; lower least"
            )
        return {
            SiteId(re.sub("[^a-z]+", "-", name.lower())): self._holding(text)
            for name, text in sorted(chosen.items())
        }

    def _holding(self, text: str) -> Holding:
        kept = round(len(text) * (1 - self.held_out))
        return Holding(encode(text[:kept]), encode(text[kept:]))


def speeches() -> Mapping[str, str]:
    """Return all that each speaker says, in the order of the file."""
    said: dict[str, list[str]] = {}
    for paragraph in find(SOURCE).read_text().split("\n\n"):
        name, colon, text = paragraph.strip().partition(":\n")
        if colon and text:
            said.setdefault(name, []).append(text)
    return {name: "\n".join(texts) for name, texts in said.items()}
