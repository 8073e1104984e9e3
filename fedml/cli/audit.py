"""`fedml privacy audit`: an attack on private training as it runs here, and what it proves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedml.cli.profile import JsonOption

_MOST_SEEDS = 1000


def audit(
    recipe: Annotated[str, typer.Option(help="A recipe installed here.")] = "breast_cancer",
    recipe_file: Annotated[
        str, typer.Option("--file", help="Your own recipe, as path/file.py:Class.")
    ] = "",
    epsilon: Annotated[float, typer.Option(help="What is claimed.")] = 3.0,
    delta: Annotated[float, typer.Option(help="What is claimed.")] = 1e-5,
    clip: Annotated[float, typer.Option(help="L2 norm of one row's gradient.")] = 0.5,
    canaries: Annotated[int, typer.Option(help="Canaries of each run.")] = 2000,
    seeds: Annotated[int, typer.Option(help="Runs, each with coins and noise of its own.")] = 5,
    sites: Annotated[int, typer.Option(help="Sites that share the canaries.")] = 5,
    rounds: Annotated[int, typer.Option(help="Rounds of each run.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps at each site in each round.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Try to prove that private training here leaks more than it claims.

    Trains a recipe as sites do, with canaries among its rows, and guesses from what leaves the
    sites which canaries were there. Status 1 if the claim is refuted. No real row is read.

    Example: fedml privacy audit --recipe breast_cancer --epsilon 3 --canaries 2000 --seeds 5
    """
    from fedml.cli.console import emit, fail, show
    from fedml.errors import ConfigError
    from fedml.learning.recipe import identify, load
    from fedml.privacy.audit import distribution_free_bound, estimate, gaussian_bound, judge
    from fedml.protocol.messages import Privacy
    from fedml.simulation.canaries import Audit

    if not 1 <= seeds <= _MOST_SEEDS:
        raise ConfigError(f"--seeds {seeds}: give 1 to {_MOST_SEEDS}")
    extra = {recipe: str(Path(recipe_file))} if recipe_file else {}
    made = load(identify(recipe, extra), extra)
    asked = Privacy("record", epsilon, delta, clip, rounds)
    about = Audit(made, asked, canaries, sites, steps)
    runs = [about.play(seed) for seed in range(seeds)]
    verdict = judge(runs, epsilon, delta)
    if as_json:
        emit(verdict)
    else:
        show(
            list(enumerate(runs)),
            {
                "seed": lambda item: item[0],
                "proven, any mechanism": lambda i: f"{distribution_free_bound(i[1], delta):.2f}",
                "proven, Gaussian": lambda i: f"{gaussian_bound(i[1], delta):.2f}",
                "estimate": lambda i: f"{estimate(i[1], delta):.2f}",
            },
            as_json=False,
        )
        typer.echo(
            f"all {seeds * canaries} canaries: proven {verdict.gaussian:.2f}, estimate "
            f"{verdict.estimate:.2f}, claimed {epsilon:g} (delta {delta:g}, one row more or less)"
        )
    if verdict.broken:
        fail(f"the claim is refuted: {verdict.broken}")
    if not as_json:
        typer.echo("the claim stands")
