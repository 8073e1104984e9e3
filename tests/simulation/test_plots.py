"""Curves show what the receipts say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from fedml.protocol.messages import Privacy
from fedml.simulation import plots, sweep
from fedml.simulation.sweep import Job
from tests.simulation.worlds import chronicle, plan


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keep each figure that is saved, by its file's name."""
    figures: dict[str, Any] = {}
    save = Figure.savefig

    def keep(figure: Figure, path: Path, **settings: Any) -> None:
        figures[Path(path).name.removeprefix(".")] = figure
        save(figure, path, **settings)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_scores_loss_and_epsilon_are_drawn_by_round(tmp_path: Path, drawn: dict[str, Any]) -> None:
    engine, told = chronicle(plan(every=1))
    engine.play()
    files = plots.draw(tmp_path, "a title", told.entries)
    assert [file.name for file in files] == ["score.png", "loss.png"]
    (axes,) = drawn["score.png"].axes
    (line,) = axes.lines
    expected = [
        (e.receipt.round, e.receipt.scores["accuracy"]) for e in told.entries if e.receipt.scores
    ]
    assert [(x, y) for x, y in line.get_xydata()] == expected
    assert (axes.get_title(), axes.get_xlabel()) == ("a title", "round")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["accuracy"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_epsilon_is_drawn_if_it_is_spent(tmp_path: Path, drawn: dict[str, Any]) -> None:
    privacy = Privacy("record", epsilon=5.0, delta=1e-5, rounds=2, evaluation_epsilon=1.0)
    engine, told = chronicle(plan(rounds=2, privacy=privacy))
    engine.play()
    plots.draw(tmp_path, "a title", told.entries)
    most = drawn["epsilon.png"].axes[0].lines[0].get_ydata()
    assert 0 < most[0] < most[1] <= 5.0


def job(number: int, epsilon: float, seed: int, accuracy: float) -> Job:
    privacy = Privacy("record", epsilon=epsilon, delta=1e-5, rounds=3, evaluation_epsilon=1.0)
    summary = {"state": "done", "rounds": 3, "seconds": 1.0, "scores": {"accuracy": accuracy}}
    given = {"privacy.epsilon": str(epsilon), "seed": str(seed)}
    return Job(number, Path(str(number)), given, plan(privacy=privacy), summary)


def test_the_trade_of_privacy_for_score_has_means_and_error_bars(
    tmp_path: Path, drawn: dict[str, Any]
) -> None:
    jobs = [job(0, 1.0, 0, 0.6), job(1, 1.0, 1, 0.8), job(2, 8.0, 0, 0.9), job(3, 8.0, 1, 0.9)]
    public = Job(
        4, Path("4"), {}, plan(), {"state": "done", "rounds": 3, "scores": {"accuracy": 0.95}}
    )
    failed = Job(5, Path("5"), {"seed": "9"}, error="it broke")
    files = sweep.write(tmp_path, [*jobs, public, failed])
    assert files[-1].name == "privacy-utility.png"
    (axes,) = drawn["privacy-utility.png"].axes
    (bars,) = axes.containers
    points, _, (sticks,) = bars.lines
    assert points.get_xydata().tolist() == [[1.0, pytest.approx(0.7)], [8.0, pytest.approx(0.9)]]
    low, high = sticks.get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * 0.1414, abs=1e-3)  # sample sd of .6 and .8, twice
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["fedavg without privacy", "fedavg (2 seeds)"]
    assert axes.get_xscale() == "log"


def test_one_epsilon_makes_no_curve(tmp_path: Path) -> None:
    assert len(sweep.write(tmp_path, [job(0, 1.0, 0, 0.6), job(1, 1.0, 1, 0.8)])) == 2
