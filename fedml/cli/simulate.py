"""`fedml simulate`: a Hydra program whose jobs are simulated federations."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import cast

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from fedml import durable
from fedml.cli import completion, resumption
from fedml.cli.compose import (
    SIMULATIONS,
    VERSION,
    build,
    clear_errors,
    configs,
    has_own,
    offer_choices,
    plan_of,
)
from fedml.cli.live import Live
from fedml.cli.misspelt import mend
from fedml.errors import ConfigError, FedmlError
from fedml.learning.recipe import Recipe, load
from fedml.params import Params
from fedml.protocol.messages import SiteId
from fedml.rounds import Plan
from fedml.rounds.vigil import Vigil
from fedml.simulation import plots, results, sweep
from fedml.simulation.attackers import Attackers
from fedml.simulation.checkpoint import Checkpoints
from fedml.simulation.chronicle import Chronicle
from fedml.simulation.engine import Engine, Outcome, statuses
from fedml.simulation.executors.base import Holding, MakeExecutor
from fedml.simulation.fingerprint import fingerprinted, of_holdings
from fedml.simulation.population import Data, Population, Split
from fedml.simulation.tracking import State, Story, Tracking
from fedml.simulation.witness import Witness
from fedml.simulation.world import MakeWorld, World


def simulate(argv: Sequence[str]) -> int:
    """Run `fedml simulate` with Hydra's own command line; return the exit status.

    Results lie in Hydra's output folder. Raises `ConfigError` in one line. Several jobs (`-m`)
    all run, whatever becomes of one; the status is 0 if each came to its end.
    """
    argv = resumption.expand(argv)
    offer_choices()
    jobs = _Jobs()
    command = hydra.main(config_path=str(configs()), config_name="simulate", version_base=VERSION)(
        jobs.play
    )
    overrides = [word for word in argv if "=" in word and not word.startswith("-")]

    def mended(text: str) -> str:
        return mend(text, str(configs()), overrides)

    with _command_line(argv), completion.one_word(argv), clear_errors(mended):
        try:
            command()
        except SystemExit as leave:  # --help, --info and argparse's own complaints
            return leave.code if isinstance(leave.code, int) else int(bool(leave.code))
        except KeyboardInterrupt:
            jobs.conclude("KILLED")
            raise
        return jobs.conclude("FINISHED")


class _Jobs:
    """The jobs of one command: a single one, or those of a multirun."""

    def __init__(self) -> None:
        self._errors: list[FedmlError] = []
        self._ends: list[bool] = []
        self._jobs: list[sweep.Job] = []
        self._sweep: Path | None = None
        self._tracking: Tracking | None = None

    def play(self, config: DictConfig) -> Mapping[str, float] | None:
        """Run one job, as Hydra calls it; return its final scores, or None if it failed."""
        settings = HydraConfig.get()
        folder = Path(settings.runtime.output_dir)
        if settings.mode == RunMode.MULTIRUN:
            self._sweep = Path(settings.sweep.dir)
        words = [word.partition("=") for word in settings.overrides.task]
        number = int(settings.job.num) if self._sweep else 0
        plan: Plan | None = None
        summary: Mapping[str, object] = {}
        error = ""
        try:
            with clear_errors():
                job = _prepare(config, folder, self._sweep)
                self._tracking, plan = job.tracking, job.plan
                summary = job.play()
            self._ends.append(summary["state"] == "done")
        except FedmlError as caught:  # kept from Hydra, which would print a traceback
            self._errors.append(caught)
            error = str(caught)
            if self._sweep:
                print(f"error: job {number}: {error}", file=sys.stderr)
        given = {key.lstrip("+"): value for key, _, value in words}
        self._jobs.append(sweep.Job(number, folder, given, plan, summary, error))
        return cast(Mapping[str, float], summary["scores"]) if summary else None

    def conclude(self, state: State) -> int:
        """Sum up a multirun, and return the exit status; raises the error of a single job."""
        if self._sweep is None:
            if self._errors:
                raise self._errors[0]
            return 0 if all(self._ends) else 1
        if self._jobs:
            files = sweep.write(self._sweep, self._jobs)
            print(f"{len(self._jobs)} jobs: {', '.join(str(path) for path in files)}")
        failed = sum(1 for job in self._jobs if job.error or job.summary["state"] != "done")
        if self._tracking and (line := self._tracking.conclude(self._sweep, state)):
            print(line)
        if failed:
            print(f"error: {failed} of {len(self._jobs)} jobs failed", file=sys.stderr)
        return int(failed > 0)


@dataclass(frozen=True)
class _Stage:
    """Who plays, where the work is done, and in what world."""

    holdings: Mapping[SiteId, Holding]
    make: MakeExecutor
    world: World


@dataclass(frozen=True)
class _Job:
    """One simulation, composed and checked, that is about to begin or to go on."""

    plan: Plan
    recipe: Recipe
    stage: _Stage
    tracking: Tracking
    story: Story
    seconds: float  # between two checkpoints

    def play(self) -> Mapping[str, object]:
        """Run to the end, or to Ctrl-C; leave the results in the folder; return the summary."""
        folder = self.story.folder
        with durable.lock(folder / "checkpoint", "fedml simulate"):
            chronicle = Chronicle(Checkpoints(folder / "checkpoint", self.seconds))
            outcome: Outcome | None = None
            try:
                outcome = self._run(chronicle)
                chronicle.keep()
            finally:
                chronicle.checkpoints.close()
                if chronicle.entries or outcome:
                    summary = self._leave(chronicle, outcome)
        return summary

    def _run(self, chronicle: Chronicle) -> Outcome:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan.seed)
            params = Params(self.recipe.build().state_dict())
        run = chronicle.begin(self.plan, params)
        stage, holdings = self.stage, self.stage.holdings
        executor = stage.make(self.plan, self.recipe, holdings, chronicle.memory)
        witness = Witness(executor)
        chronicle.follow(run, witness)
        if chronicle.entries:
            print(_going_on(self.plan, run.done))
        engine = Engine(
            run, witness, statuses(self.plan, holdings), stage.world, chronicle.note,
            chronicle.now, chronicle.flight,
        )  # fmt: skip
        with Live(self.plan.rounds, run.done) as live, _stoppable(chronicle):
            chronicle.tell = live.tell
            return engine.play()

    def _leave(self, chronicle: Chronicle, outcome: Outcome | None) -> Mapping[str, object]:
        folder, plan = self.story.folder, self.plan
        summary = results.write(folder, plan, chronicle.entries, outcome)
        title = f"{plan.model}, {type(plan.strategy).__name__}, {len(self.stage.holdings)} sites"
        plots.draw(folder, title, chronicle.entries)
        print(f"{summary['state']}: {summary['detail']}")
        print(f"results are in {folder}")
        if outcome is None:
            print(f"go on with: fedml simulate resume={folder}")
        state: State = "FINISHED" if outcome and outcome.end.state == "done" else "FAILED"
        line = self.tracking.record(self.story, chronicle.entries, state if outcome else "KILLED")
        if line:
            print(line)
        for alert in Vigil(entry.receipt for entry in chronicle.entries).alerts():
            print(f"alert: {alert}")
        return summary


_TRUSTED = (
    "privacy {mode}: epsilon is that of the sum of all sites' updates, which this simulation "
    "adds up as the party that all would trust"
)


def _going_on(plan: Plan, done: int) -> str:
    line = f"going on after round {done} of {plan.rounds}"
    if plan.privacy.mode == "none":
        return line
    return f"{line}; privacy noise is never drawn twice, so what follows is another course"


def _prepare(config: DictConfig, folder: Path, multirun: Path | None) -> _Job:
    """Return the job that `config` describes; raises `ConfigError` before anything is run."""
    config = resumption.settle(config, folder)
    values = build(config, targets=SIMULATIONS)
    data = cast(Data | None, values.pop("data", None))
    known = fingerprinted(data) if data is not None else None
    population = cast(Population, values.pop("population"))
    make = cast(MakeExecutor, values.pop("executor"))
    world = cast(MakeWorld, values.pop("world"))
    attackers = cast(Attackers | None, values.pop("attackers", None))
    tracking = cast(Tracking, values.pop("tracking"))
    seconds, recipes = values.pop("checkpoint"), values.pop("recipes", None)
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ConfigError(f"checkpoint {seconds!r}: give the seconds between two, 0 or more")
    values.pop("resume", None)
    plan = plan_of(values)
    recipe = load(plan.recipe, cast(Mapping[str, str], recipes or {}))
    resumption.check_plan(folder, plan)
    holdings = population.deal(recipe, known)
    for note in holdings.notes if isinstance(holdings, Split) else ():
        print(note)
    if plan.privacy.shares_noise and not plan.secagg.is_on:
        print(_TRUSTED.format(mode=plan.privacy.mode))
    _check_cohort(plan, holdings)
    make = attackers.take_over(make) if attackers else make
    digest = known.digest if known else of_holdings(holdings)
    settings = cast(dict[str, object], OmegaConf.to_container(config, resolve=True))
    story = Story(plan, settings, folder, digest, multirun)
    stage = _Stage(holdings, make, world(plan, holdings))
    return _Job(plan, recipe, stage, tracking, story, float(seconds))


def _check_cohort(plan: Plan, holdings: Mapping[SiteId, Holding]) -> None:
    if plan.cohort.quorum > len(holdings):
        raise ConfigError(
            f"cohort.quorum {plan.cohort.quorum} is above the {len(holdings)} sites of the "
            "population: lower it or raise population.sites"
        )
    if strangers := [site for site in plan.cohort.sites if site not in holdings]:
        raise ConfigError(
            f"cohort.sites: {', '.join(strangers)} not in the population, which has "
            f"{', '.join(list(holdings)[:5])}{', ...' if len(holdings) > 5 else ''}"
        )


@contextmanager
def _stoppable(chronicle: Chronicle) -> Iterator[None]:
    """Let Ctrl-C wait for the next commit if that spares work; a second one does not wait."""
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if chronicle.stop() or asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not the main thread: whoever runs us has signals in hand
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _command_line(argv: Sequence[str]) -> Iterator[None]:
    """Hydra reads its arguments from `sys.argv`, and hides errors unless the environment says.

    The folder `simulations` of here, or of our source tree, can be imported meanwhile.
    """
    before, full, path = sys.argv, os.environ.get("HYDRA_FULL_ERROR"), list(sys.path)
    sys.argv = ["fedml simulate", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.path[:0] = [str(home) for home in (Path.cwd(), configs().parent) if has_own(home)]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before, path
        if full is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full
