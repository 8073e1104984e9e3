"""The next character of Shakespeare, from the ones before: a small character LSTM.

Source: McMahan et al. 2017, arXiv:1602.05629, section 3, and LEAF (Caldas et al. 2018,
arXiv:1812.01097), whose LSTM has two layers of 256 units and looks back 80 characters; this one
is small enough for one laptop core.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows

ALPHABET = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LOOK_BACK = 20  # characters
_CODES = {character: code for code, character in enumerate(ALPHABET)}
_EMBEDDING, _UNITS = 8, 64


class Shakespeare:
    """The recipe; scores `accuracy`. A row is `LOOK_BACK` codes, its label the next one."""

    labels = tuple("newline" if c == "\n" else "space" if c == " " else c for c in ALPHABET)

    def build(self) -> nn.Module:
        """Return the network, drawn at random as PyTorch does."""
        return _Characters()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`: 1 where the likeliest character is the right one."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Return the rows of a text: one for each character that has `LOOK_BACK` before it."""
        try:
            return encode(path.read_text())
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            raise ConfigError(f"{path}: {error}; give a plain English text") from error

    def example(self, rows: int) -> Tensor:
        """Return characters drawn evenly."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(len(ALPHABET), (rows, LOOK_BACK), generator=generator)


def encode(text: str) -> Rows:
    """Return a row for each character that has `LOOK_BACK` before it; `ConfigError` if none."""
    unknown = sorted(set(text) - _CODES.keys())
    if unknown or len(text) <= LOOK_BACK:
        what = f"unknown characters {unknown[:5]}" if unknown else f"{len(text)} characters"
        raise ConfigError(f"{what}: {LOOK_BACK + 1} or more of {ALPHABET!r} are needed")
    codes = torch.tensor([_CODES[character] for character in text])
    windows = codes.unfold(0, LOOK_BACK + 1, 1)
    return Rows(windows[:, :-1], windows[:, -1])


class _Characters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), _EMBEDDING)
        self.memory = nn.LSTM(_EMBEDDING, _UNITS, batch_first=True)
        self.output = nn.Linear(_UNITS, len(ALPHABET))

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.memory(self.embedding(x))
        answer: Tensor = self.output(states[:, -1])
        return answer
