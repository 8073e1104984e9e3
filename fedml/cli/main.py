"""The `fedml` command. Every import that takes time happens inside the command that needs it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from fedml import __version__
from fedml.cli import coordinator, flower, model, operator, privacy, run, site
from fedml.cli.console import guarded
from fedml.cli.profile import JsonOption, home

# plain help: rich takes its time to load, and typer then writes "\\[default: ...]"
typer.core.HAS_RICH = False
app = typer.Typer(
    name="fedml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(coordinator.app, name="coordinator")
app.add_typer(site.app, name="site")
app.add_typer(operator.app, name="operator")
app.add_typer(run.app, name="run")
app.add_typer(model.app, name="model")
app.add_typer(privacy.app, name="privacy")
app.add_typer(flower.app, name="flower")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Federated learning that hospitals and banks can run: train, release, serve.

    Example: fedml demo
    """
    if verbose:
        os.environ["FEDML_VERBOSE"] = "1"


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
def simulate(ctx: typer.Context) -> int:
    """Simulate a federation on this machine, composed by Hydra.

    Example: fedml simulate strategy=fedprox strategy.mu=0.1 privacy=record privacy.epsilon=3
    """
    from fedml.cli import completion

    if told := completion.script(
        ctx.args
    ):  # at the start of every shell: none shall wait for torch
        typer.echo(told)
        return 0
    from fedml.cli.simulate import simulate as play

    return play(ctx.args)


@app.command()
def strategies(
    modes: Annotated[
        bool, typer.Option("--modes", help="What goes with which privacy and secure aggregation.")
    ] = False,
    file: Annotated[
        str, typer.Option(help="The same for a strategy of your own, file.py:Class.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """List strategies, reducers, rules, recipes, executors and registries, and where each is from.

    Example: fedml strategies --modes
    """
    from fedml.cli.strategies import tell

    tell(file, show_modes=modes, as_json=as_json)


@app.command()
def demo(
    data: Annotated[
        str, typer.Option(help="'breast_cancer' (shipped) or 'heart'.")
    ] = "breast_cancer",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the four hospitals' files, for heart.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where everything goes; it is emptied.")] = Path(
        "build/demo"
    ),
    split_seed: Annotated[int, typer.Option(help="Which rows go to which hospital.")] = 596,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Show the whole product: four hospitals train, release, serve, crash and go on.

    Example: fedml demo --data heart --data-dir ../data/heart_disease_uci
    """
    from fedml.cli.demo import play

    play(data, data_dir, folder, split_seed=split_seed, as_json=as_json)


@app.command()
def predict(
    rows: Annotated[Path, typer.Argument(help="CSV file with one row a line, header allowed.")],
    model_name: Annotated[str, typer.Option("--model", help="The model's name.")],
    url: Annotated[str, typer.Option(help="A site's endpoint.")] = "http://127.0.0.1:8400",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a row.")] = False,
) -> None:
    """Ask a site's endpoint for predictions.

    Example: fedml predict new_patients.csv --model breast_cancer --url http://127.0.0.1:8400
    """
    from fedml.cli.predict import ask

    ask(rows, model_name, url, as_json=as_json)


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="A site's folder.")],
    rest_port: Annotated[int, typer.Option(help="REST port; 0 takes a free one.")] = 8400,
    grpc_port: Annotated[int, typer.Option(help="gRPC port; 0 takes a free one.")] = 8401,
) -> None:
    """Serve what lies on a site's shelf, and nothing else: no coordinator, no training.

    Example: fedml serve ./site --rest-port 8400 --grpc-port 8401
    """
    from fedml.cli.site import serve_only

    serve_only(folder, rest_port, grpc_port)


@app.command()
def doctor(
    folder: Annotated[
        Path | None,
        typer.Argument(
            envvar="FEDML_PROFILE",
            help="A site's or a coordinator's folder, or an operator's profile.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check certificates, clock, disk, versions, ports and data, and say what to do.

    Changes nothing; status 1 if anything fails. Without a folder it looks at your profile.

    Example: fedml doctor /var/lib/fedml
    """
    from fedml.cli.doctor import report

    report(folder or home(), as_json=as_json)


def main() -> None:
    """Run the command line."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong, we say ourselves, once
    guarded(lambda: app(standalone_mode=False))
