"""A Flower app played on this machine, in a run folder from which it goes on after a crash."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median

from flwr.app import Context, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedml import durable
from fedml.errors import ConfigError, FedmlError, MalformedUpdate, TaskFailed
from fedml.flower import app as apps
from fedml.flower import private
from fedml.flower.contents import params_of
from fedml.flower.grid import RUN, Exchange, SimulatedGrid
from fedml.flower.randomness import draw, sow
from fedml.flower.record import Record
from fedml.params import encode
from fedml.protocol.apps import Values, read_values
from fedml.records import Reader, from_record

_SITES = 10  # as Flower's simulation has them
Metrics = dict[str, float | list[float]]
Scores = dict[int, Metrics]  # by round
Tell = Callable[[Exchange], None]
Seat = Callable[[Record, Tell], Grid]  # gives a ServerApp its sites


@dataclass(frozen=True)
class Setup:
    """What a run is made of; the same setup makes the same run."""

    app: str  # its folder
    digest: str  # of its code and settings
    config: Values
    sites: int
    seed: int
    flower: str  # the version it was begun with

    def __post_init__(self) -> None:
        if self.sites < 1:
            raise ConfigError(f"--num-supernodes {self.sites}: at least one site must take part")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed}: must be from 0 to {2**63 - 1}")


@dataclass
class Outcome:
    """What a run came to: the metrics that its strategies returned, and how long it took.

    `train` and `evaluate` are the sites' metrics as the strategy put them together, `server` is
    the ServerApp's own evaluation.
    """

    train: Scores = field(default_factory=dict)
    evaluate: Scores = field(default_factory=dict)
    server: Scores = field(default_factory=dict)
    exchanges: list[Exchange] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)  # of exchanges, in seconds from the start
    seconds: float = 0.0
    model: str = ""  # the file's name, "" if no strategy returned one that can be kept

    @property
    def failures(self) -> dict[str, set[int]]:
        """The sites that answered with an error, by what it was."""
        found = dict[str, set[int]]()
        for exchange in self.exchanges:
            for failure in exchange.failures:
                found.setdefault(failure.reason, set()).add(failure.site)
        return found

    @property
    def pace(self) -> float:
        """The median seconds from round to round, by the first kind of exchange; 0 if unknown.

        The first round is not in it: it has to import and to build what later ones find.
        """
        first = self.exchanges[0].kind if self.exchanges else ""
        pairs = zip(self.exchanges, self.ends, strict=True)
        ends = [end for exchange, end in pairs if exchange.kind == first]
        return median([b - a for a, b in pairwise(ends)] or [0.0])

    def shown(self) -> dict[str, object]:
        """Return it as JSON values, without traces."""
        exchanges = [
            {**dataclasses.asdict(each), "failures": [[f.site, f.reason] for f in each.failures]}
            for each in self.exchanges
        ]
        return {**dataclasses.asdict(self), "exchanges": exchanges}


def prepare(
    folder: Path, words: tuple[str, ...] = (), sites: int | None = None, seed: int = 0
) -> Setup:
    """Return the setup for the app in `folder`; raises `ConfigError` if something does not fit."""
    app = apps.read(folder)
    config = apps.overridden(app.config, words)
    count = _SITES if app.sites is None else app.sites
    return Setup(
        str(app.folder),
        app.digest(),
        config,
        count if sites is None else sites,
        seed,
        version("flwr"),
    )


def begun(folder: Path) -> Setup:
    """Return the setup of the run in `folder`, which is to go on.

    Raises `ConfigError` if it is over, or if it could only become another run.
    """
    path = folder / "run.json"
    if not path.exists():
        raise ConfigError(f"{folder} is no run of a Flower app: it has no run.json")
    readers: dict[object, Reader] = {Values: read_values}
    setup = from_record(Setup, durable.read_json(path), str(path), readers)
    if (folder / "result.json").exists():
        raise ConfigError(f"{folder} is over, there is nothing to go on with; see its result.json")
    if setup.flower != version("flwr"):
        raise ConfigError(
            f"{folder} was begun with flwr {setup.flower}, and {version('flwr')} is installed; "
            f"pip install flwr=={setup.flower}, or begin the run anew"
        )
    if setup.digest != apps.read(Path(setup.app)).digest():
        raise ConfigError(
            f"{setup.app} is not what it was when {folder} was begun; "
            "restore the app's files, or begin the run anew"
        )
    return setup


def play(
    setup: Setup,
    folder: Path,
    *,
    least: float = 1.0,
    tell: Tell = lambda exchange: None,
    seat: Seat | None = None,
) -> Outcome:
    """Run the app to its end, or from where `folder` has it to its end.

    Its sites are simulated, unless `seat` gives it others.

    At most `least` seconds of work are lost in a crash. Leaves `run.json`, `result.json`, the
    model and, of what failed, `errors.log`. Raises `TaskFailed` if the ServerApp does, or if no
    site ever answered without an error.
    """
    with durable.lock(folder, "a Flower run"):
        if not (folder / "run.json").exists():
            durable.replace(folder / "run.json", _json(dataclasses.asdict(setup)))
        record, outcome = Record(folder / "replies.bin", least), Outcome()
        gc.freeze()  # some strategies collect garbage at each reply; not through all of torch
        try:
            _serve(setup, folder, record, outcome, tell, seat or _simulated(setup))
        finally:
            gc.unfreeze()
            record.close()
        durable.replace(folder / "result.json", _json(outcome.shown()))
        record.discard()
    return outcome


def _simulated(setup: Setup) -> Seat:
    client = apps.read(Path(setup.app)).load_client()

    def seat(record: Record, tell: Tell) -> Grid:
        return SimulatedGrid(
            client, setup.sites, config=setup.config, seed=setup.seed, record=record, tell=tell
        )

    return seat


def _serve(
    setup: Setup, folder: Path, record: Record, outcome: Outcome, tell: Tell, seat: Seat
) -> None:
    server = apps.read(Path(setup.app)).load_server()
    start = time.perf_counter()

    def note(exchange: Exchange) -> None:
        outcome.exchanges.append(exchange)
        outcome.ends.append(time.perf_counter() - start)
        _log(folder, *(f"site {f.site}:\n{f.trace}" for f in exchange.failures if f.trace))
        tell(exchange)

    grid = seat(record, note)
    context = Context(RUN, private.COORDINATOR, {}, RecordDict(), dict(setup.config))
    sow(draw(setup.seed))
    with private.overheard(lambda result: _take(result, folder, outcome)):
        try:
            server(grid, context)
        except FedmlError:
            raise
        except (Exception, SystemExit) as error:
            _log(folder, f"the ServerApp:\n{traceback.format_exc()}")
            raise _failed(error, folder, outcome) from error
    outcome.seconds = time.perf_counter() - start
    asked = sum(exchange.asked for exchange in outcome.exchanges)
    if asked and asked == sum(len(exchange.failures) for exchange in outcome.exchanges):
        raise TaskFailed(
            f"every site failed: {next(iter(outcome.failures))}; see {folder}/errors.log"
        )


def _failed(error: BaseException, folder: Path, outcome: Outcome) -> TaskFailed:
    """Return what a ServerApp's end by an exception means, in one line."""
    kind = "" if isinstance(error, private.Stop) else f"{type(error).__name__}: "
    sites = "".join(f"; before that, a site: {reason}" for reason in list(outcome.failures)[:1])
    text = " ".join(str(error).split())
    return TaskFailed(f"the ServerApp failed: {kind}{text}{sites}; see {folder}/errors.log")


def _take(result: Result, folder: Path, outcome: Outcome) -> None:
    """Take in what a strategy returned; of several, rounds and model of the last one stand."""
    for scores, found in (
        (outcome.train, result.train_metrics_clientapp),
        (outcome.evaluate, result.evaluate_metrics_clientapp),
        (outcome.server, result.evaluate_metrics_serverapp),
    ):
        scores.clear()
        scores.update({round_: _metrics(metrics) for round_, metrics in found.items()})
    outcome.model = ""
    if result.arrays:
        try:
            pieces = encode({"": params_of(result.arrays)})
        except (ConfigError, MalformedUpdate) as error:  # a kind of numbers that we do not have
            _log(folder, f"the model: {error}")
            return
        outcome.model = "model.safetensors"
        durable.replace(folder / outcome.model, *pieces)


def _metrics(metrics: MetricRecord) -> Metrics:
    return {key: list(v) if isinstance(v, list) else v for key, v in metrics.items()}


def _log(folder: Path, *texts: str) -> None:
    if texts:
        with (folder / "errors.log").open("a") as file:
            file.writelines(f"{text}\n" for text in texts)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"
