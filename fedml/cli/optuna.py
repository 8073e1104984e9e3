"""A Hydra sweeper over Optuna, `hydra/sweeper=optuna`: tuning by trial.

Hydra's own plug-in is pinned to Optuna 2, of 2021. The search space is written in Hydra's
grammar: `interval(a, b)`, `tag(log, interval(a, b))`, `choice(...)`, `a,b,c` and `range(...)`.
The study is a database in the sweep's folder: started again there, it goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from fedml import durable
from fedml.errors import ConfigError

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution

STUDY, BEST = "study.db", "best.json"


class OptunaSweeper(Sweeper):
    """Runs `n_trials` jobs, `n_jobs` of them between two looks at the results.

    A job's value is the score `objective` of its summary. One that fails counts as a failed
    trial, and the sweep goes on.
    """

    hydra_context: HydraContext | None
    config: DictConfig | None
    launcher: Launcher | None

    def __init__(
        self,
        *,
        n_trials: int,
        objective: str,
        direction: Literal["maximize", "minimize"],
        seed: int,
        n_jobs: int = 1,
        study_name: str = "simulate",
    ) -> None:
        """Refuse what no study could be made of."""
        if direction not in ("maximize", "minimize"):
            raise ConfigError(
                f"hydra.sweeper.direction {direction!r}: use 'maximize' or 'minimize'"
            )
        if n_trials < 1 or n_jobs < 1:
            raise ConfigError(f"hydra.sweeper: n_trials {n_trials}, n_jobs {n_jobs}: 1 or more")
        self.n_trials, self.n_jobs = n_trials, n_jobs
        self.objective, self.direction, self.seed = objective, direction, seed
        self.study_name = study_name

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take in what Hydra gives every sweeper."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Ask, run, tell until the study has its trials; write `best.json` and print the best."""
        assert self.config is not None, "Hydra calls setup() first"
        folder = Path(self.config.hydra.sweep.dir)
        durable.make_folder(folder)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        fixed, space = search_space(self._parse(arguments))
        study = self._study(folder)
        number = len(study.trials)
        while (left := self.n_trials - len(study.trials)) > 0:
            asked = [study.ask(space) for _ in range(min(self.n_jobs, left))]
            self._run(study, asked, fixed, number)
            number += len(asked)
        self._report(study, folder)

    def _parse(self, arguments: list[str]) -> list[Override]:
        assert self.hydra_context is not None, "Hydra calls setup() first"
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        return parser.parse_overrides(arguments)

    def _study(self, folder: Path) -> Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=f"sqlite:///{folder / STUDY}",
            study_name=self.study_name,
            direction=self.direction,
            load_if_exists=True,
            sampler=None,
        )
        # a study that goes on must not draw its first points again
        study.sampler = optuna.samplers.TPESampler(seed=self.seed + len(study.trials))
        for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # a crash ended it
        return study

    def _run(self, study: Study, asked: Sequence[Trial], fixed: Sequence[str], number: int) -> None:
        from optuna.trial import TrialState

        assert self.launcher is not None, "Hydra calls setup() first"
        batch = [
            [*fixed, *(f"{key}={value}" for key, value in trial.params.items())] for trial in asked
        ]
        self.validate_batch_is_legal(batch)
        results = self.launcher.launch(batch, initial_job_idx=number)
        for trial, result in zip(asked, results, strict=True):
            scores = result.return_value
            if isinstance(scores, Mapping) and self.objective not in scores:
                there = ", ".join(sorted(scores)) or "none"
                raise ConfigError(
                    f"hydra.sweeper.objective {self.objective!r}: no such score; there are {there}"
                )
            if isinstance(scores, Mapping):
                study.tell(trial, float(scores[self.objective]))
            else:
                study.tell(trial, state=TrialState.FAIL)

    def _report(self, study: Study, folder: Path) -> None:
        from optuna.trial import TrialState

        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        told: dict[str, Any] = {"trials": len(study.trials), "completed": len(done)}
        if done:
            best = study.best_trial
            told |= {"trial": best.number, self.objective: best.value, "overrides": best.params}
            settings = " ".join(f"{key}={value}" for key, value in best.params.items())
            print(f"best {self.objective} {best.value:.4f} in trial {best.number}: {settings}")
        durable.replace(folder / BEST, durable.dump_json(told) + b"\n")


def search_space(overrides: Sequence[Override]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """Return the overrides that stay as they are, and what is searched, by key.

    Raises `ConfigError` for a sweep that no distribution fits, or if nothing is searched.
    """
    fixed: list[str] = []
    space: dict[str, BaseDistribution] = {}
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override():
            space[key] = _distribution(key, override)
        else:
            fixed.append(f"{key}={override.get_value_element_as_str()}")
    if not space:
        raise ConfigError(
            "there is nothing to search: give at least one interval(a,b), choice(...) or range(...)"
        )
    return fixed, space


def _distribution(key: str, override: Override) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    value = override.value()
    log = "log" in getattr(value, "tags", ())
    try:
        if isinstance(value, IntervalSweep):
            low, high = float(value.start or 0), float(value.end or 0)
            if "int" in value.tags:
                return IntDistribution(int(low), int(high), log=log)
            return FloatDistribution(low, high, log=log)
        if isinstance(value, RangeSweep) and value.start is not None and value.stop is not None:
            if all(isinstance(n, int) for n in (value.start, value.stop, value.step)):
                numbers = range(int(value.start), int(value.stop), int(value.step))
                return IntDistribution(numbers[0], numbers[-1], step=numbers.step)
            return FloatDistribution(value.start, value.stop - value.step, step=value.step)
        if isinstance(value, ChoiceSweep):
            return CategoricalDistribution([*override.sweep_string_iterator()])
    except (ValueError, IndexError) as error:
        raise ConfigError(f"{key}: {error}") from error
    raise ConfigError(f"{key}: Optuna cannot search {value}; use interval(a,b) or choice(...)")
