from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedml.errors import ConfigError
from fedml.params import Params
from simulations.shakespeare.data import Speakers, speeches
from simulations.shakespeare.recipe import ALPHABET, STRIDE, WINDOW, Shakespeare, windows
from tests.simulations.data import FOLDER, needs

torch.set_num_threads(1)
PLACE = "tinyshakespeare/input.txt"
TEXT = "But, soft! what light through yonder window breaks?"


def decode(codes: torch.Tensor) -> str:
    return "".join(ALPHABET[code] for code in codes.tolist())


def test_rows_are_windows_and_what_follows_them() -> None:
    rows = windows(TEXT)
    assert len(rows) == (len(TEXT) - WINDOW - 1) // STRIDE + 1
    for k in range(len(rows)):
        start = k * STRIDE
        assert decode(rows.x[k]) == TEXT[start : start + WINDOW]
        assert ALPHABET[int(rows.y[k])] == TEXT[start + WINDOW]


@needs(PLACE)
def test_the_real_text_has_its_speakers_and_known_characters() -> None:
    path = FOLDER / PLACE
    said = speeches(path)
    assert len(said) == 299
    assert said["First Citizen"].startswith("Before we proceed any further, hear me speak.\n")
    assert set(path.read_text()) <= set(ALPHABET)
    words = len("".join(said.values()).split())
    assert 0.9 < words / len(path.read_text().split()) < 1  # the rest is names of speakers


@needs(PLACE)
def test_speakers_have_at_least_so_many_rows_and_score_their_last_words() -> None:
    said = speeches(FOLDER / PLACE)
    dealt = Speakers(least=2000).deal(Shakespeare(), None)
    assert len(dealt) == 59
    assert len(Speakers().deal(Shakespeare(), None)) == 114
    for one in dealt.values():
        assert len(one.train) + len(one.held_out) >= 2000 - 2 * WINDOW
        assert len(one.held_out) == pytest.approx(0.25 * len(one.train), rel=0.1)
    romeo = dealt["romeo"]  # type: ignore[index]
    assert decode(romeo.train.x[0]) == said["ROMEO"][:WINDOW]
    cut = round(len(said["ROMEO"]) * 0.8)
    assert decode(romeo.held_out.x[0]) == said["ROMEO"][cut : cut + WINDOW]


@needs(PLACE)
def test_together_is_everything_in_one_place() -> None:
    apart = Speakers(least=4000).deal(Shakespeare(), None).values()
    (one,) = Speakers(least=4000, together=True).deal(Shakespeare(), None).values()
    assert len(one.train) == pytest.approx(sum(len(site.train) for site in apart), rel=0.01)


def test_a_speech_may_go_on_after_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    path.write_text("ROMEO:\nIs love\n\na tender thing?\n\nMERCUTIO:\n\nROMEO:\nIt is\nso.\n")
    assert speeches(path) == {"ROMEO": "Is love\na tender thing?\nIt is\nso.\n"}


def test_the_network_is_an_lstm() -> None:
    """PyTorch's own, with the same weights, gives the same logits."""
    torch.manual_seed(0)
    model, x = Shakespeare().build(), Shakespeare().example(6)
    ours = Params(model.state_dict())
    cells = ours["recur.weight"].shape[1]
    lstm = torch.nn.LSTM(ours["embed.weight"].shape[1], cells, batch_first=True)
    theirs = {
        "weight_ih_l0": ours["enter.weight"],
        "weight_hh_l0": ours["recur.weight"],
        "bias_ih_l0": ours["enter.bias"],
        "bias_hh_l0": torch.zeros(4 * cells),
    }
    lstm.load_state_dict(theirs)
    with torch.no_grad():
        out, _ = lstm(model.get_submodule("embed")(x))
        expected = model.get_submodule("leave")(out[:, -1])
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_what_cannot_be_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "play.txt"
    with pytest.raises(ConfigError, match=r"play\.txt: .*No such file"):
        Shakespeare().read(path)
    path.write_text("short")
    with pytest.raises(ConfigError, match=rf"play\.txt: 5 characters; a row needs {WINDOW + 1}"):
        Shakespeare().read(path)
    path.write_text("Où est le" * 10)
    with pytest.raises(ConfigError, match="character 'ù' is not in the alphabet"):
        Shakespeare().read(path)
    path.write_bytes(b"\xff\xfe" * 50)
    with pytest.raises(ConfigError, match="is this a plain text"):
        Shakespeare().read(path)


@needs(PLACE)
def test_impossible_speakers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"population\.least 100000: no speaker has so many rows"):
        Speakers(least=100_000).deal(Shakespeare(), None)
    with pytest.raises(ConfigError, match=r"population\.held_out 0"):
        Speakers(held_out=0)
