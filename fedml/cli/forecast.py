"""`fedml privacy plan`: what a run under privacy will cost, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedml.cli.profile import JsonOption

if TYPE_CHECKING:
    from fedml.privacy.forecast import Forecast


def plan(
    rows: Annotated[int, typer.Option(help="Rows that the site declares.")],
    epsilon: Annotated[float, typer.Option(help="What the whole run may cost each row.")],
    rounds: Annotated[int, typer.Option(help="Rounds of the run.")],
    steps: Annotated[int, typer.Option(help="Steps at the site in each round.")],
    batch: Annotated[int, typer.Option(help="Expected rows in a step; 0 for all.")] = 0,
    delta: Annotated[float, typer.Option(help="The delta of that epsilon.")] = 1e-5,
    plot: Annotated[Path | None, typer.Option(help="Draw epsilon by round into this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Work out noise, sampling and cost of private training: nothing is trained, no row is read.

    Example: fedml privacy plan --rows 500 --epsilon 3 --rounds 20 --steps 10 --batch 50
    """
    from fedml.cli.console import emit
    from fedml.privacy.forecast import forecast
    from fedml.protocol.messages import Privacy, Training

    training = Training(lr=1.0, steps=steps, batch_size=batch)
    made = forecast(training, Privacy("record", epsilon, delta, rounds=rounds), rows)
    if plot is not None:
        _draw(made, plot)
    if as_json:
        return emit(made)
    at = f"at delta {delta:g}, {made.adjacency} row"
    typer.echo(
        f"noise multiplier {made.noise:.4f}, sampling {made.sampling:.4g}, {made.steps} steps in "
        f"{rounds} rounds\n"
        f"noise on the mean gradient: {made.blur:.4f} of the clip in each coordinate\n"
        f"cost of the run, planned ahead (PLD):        epsilon {made.epsilon:.3f} {at}\n"
        f"the same events, chosen as one goes (Renyi): epsilon {made.filtered:.3f} {at}\n"
        f"a site whose fresh budget is {epsilon:g} at delta {delta:g} carries it out to the end"
    )
    if plot is not None:
        typer.echo(f"drawn: {plot}")


def _draw(made: Forecast, path: Path) -> None:
    from matplotlib.figure import Figure

    from fedml.errors import ConfigError
    from fedml.privacy.forecast import course

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    at, planned, filtered = zip(*course(made), strict=True)
    axes.plot(at, planned, label="planned ahead (PLD)")
    axes.plot(at, filtered, linestyle="--", label="chosen as one goes (Renyi filter)")
    axes.axhline(made.asked, color="grey", linewidth=0.8, label="asked")
    axes.set(
        xlabel="round",
        ylabel=f"epsilon at delta {made.delta:g}, {made.adjacency} row",
        title=f"noise {made.noise:.3f}, sampling {made.sampling:.3g}, {made.steps} steps",
        xlim=(0, made.rounds),
        ylim=(0, None),
    )
    axes.legend()
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot {path}: {error}; name a .png, .svg or .pdf file") from error
