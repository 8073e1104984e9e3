"""The next character of a speech, from the ones before it: a small LSTM.

McMahan et al. 2017, arXiv:1602.05629, section 3, and Caldas et al. 2018, arXiv:1812.01097, made
small enough for one core: a window of 20 characters instead of 80, one layer of 64 cells instead
of two of 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedml.errors import ConfigError
from fedml.learning.recipe import Rows

# Printable characters of plain English text; their order is their code.
ALPHABET = "\n !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz{|}~"  # noqa: E501
WINDOW = 20  # characters that the next one is told from
STRIDE = 3  # characters from one row to the next
_EMBEDDING, _CELLS = 8, 64


class Shakespeare:
    """The recipe; scores `accuracy` of the next character. Outputs are characters' logits."""

    labels: tuple[str, ...] = tuple(ALPHABET)

    def build(self) -> nn.Module:
        """Return embedding, LSTM and one linear layer."""
        return _NextCharacter()

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross entropy."""
        loss: Tensor = functional.cross_entropy(output, target)
        return loss

    def score(self, output: Tensor, target: Tensor) -> Mapping[str, Tensor]:
        """Return `accuracy`: 1 where the likeliest character is the right one."""
        return {"accuracy": (output.argmax(1) == target).float()}

    def read(self, path: Path) -> Rows:
        """Return the windows of a text file, and the character that follows each."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}; is this a plain text?") from error
        try:
            return windows(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def example(self, rows: int) -> Tensor:
        """Return windows of random characters."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(len(ALPHABET), (rows, WINDOW), generator=generator)


def windows(text: str) -> Rows:
    """Return every `STRIDE`th window of `text` as codes [n, WINDOW], and what follows each [n].

    Raises `ConfigError` for a character outside `ALPHABET`, or a text without one whole window.
    """
    places = {character: code for code, character in enumerate(ALPHABET)}
    odd = sorted(set(text) - places.keys())
    if odd:
        raise ConfigError(f"character {odd[0]!r} is not in the alphabet; leave it out")
    if len(text) <= WINDOW:
        raise ConfigError(f"{len(text)} characters; a row needs {WINDOW + 1}")
    codes = torch.tensor([places[character] for character in text])
    rows = codes.unfold(0, WINDOW + 1, STRIDE)
    return Rows(rows[:, :-1].contiguous(), rows[:, -1].contiguous())


class _NextCharacter(nn.Module):
    """An LSTM (Hochreiter and Schmidhuber 1997) of plain layers, so that privacy can bound them.

    From codes [n, WINDOW] to logits [n, len(ALPHABET)].
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), _EMBEDDING)
        self.enter = nn.Linear(_EMBEDDING, 4 * _CELLS)
        self.recur = nn.Linear(_CELLS, 4 * _CELLS, bias=False)
        self.leave = nn.Linear(_CELLS, len(ALPHABET))
        with torch.no_grad():  # remember at first: Jozefowicz et al. 2015
            self.enter.bias[_CELLS : 2 * _CELLS] += 1.0

    def forward(self, x: Tensor) -> Tensor:
        entering = self.enter(self.embed(x))
        state = cell = entering.new_zeros(len(x), _CELLS)
        for step in range(WINDOW):
            gates = entering[:, step] + self.recur(state)
            take, keep, new, give = gates.chunk(4, dim=1)  # PyTorch's order
            cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
            state = give.sigmoid() * cell.tanh()
        logits: Tensor = self.leave(state)
        return logits
