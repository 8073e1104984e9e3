"""Scores of a model over a site's held-out rows, noised under privacy, and their means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedml.errors import ConfigError, Refused, TaskFailed
from fedml.learning.descent import bind
from fedml.learning.persons import groups_of, means
from fedml.learning.recipe import Recipe, Rows
from fedml.privacy.accounting import evaluation_event
from fedml.privacy.mechanisms import noisy_totals
from fedml.privacy.noise import SecureNoise
from fedml.protocol.messages import Privacy
from fedml.protocol.tasks import Report, Slots, Task
from fedml.strategies import is_twofold, own_model

_CHUNK = 4096  # rows at once


def evaluate(
    recipe: Recipe,
    task: Task,
    rows: Rows,
    privacy: Privacy,
    device: str = "cpu",
    memory: Slots = MappingProxyType({}),
) -> Report:
    """Return each score's total over `rows` and their count, for the task's parameters.

    Where a rule leaves a part of the model with its site, that part is taken from `memory`.

    Under privacy the report is one `evaluation_event`: totals and count share
    its epsilon, see `noisy_totals`, and may be fractional or negative. Raises `Refused` if
    `privacy.evaluation_epsilon` is 0 then, and `ConfigError` for a score outside [0, 1].
    """
    private = privacy.in_training
    if privacy.mode != "none" and is_twofold(task.brief):
        raise Refused(
            f"rule {task.brief.rule} under {privacy.mode} privacy: this site's own model is made "
            "of its rows without noise, and so would its scores be; turn evaluation off"
        )
    event = evaluation_event(privacy) if private else None
    model = recipe.build().to(device).eval()
    bind(model, own_model(task.brief, memory).to(device).clone())
    try:
        scores = _scores(recipe, model, rows, device, alone=private)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise TaskFailed(f"task {task.id}: {(str(error).splitlines() or [''])[0]}") from error
    if event is not None:
        units = len(rows)
        if privacy.mode == "patient":  # a person's score is the mean of his rows'
            scores = {name: means(values, rows) for name, values in scores.items()}
            units = len(groups_of(rows).unique())
        totals, count = noisy_totals(scores, units, event.epsilon, SecureNoise())
    else:
        totals, count = _totals(scores, len(rows)), float(len(rows))
    return Report(task.id, task.round, task.site, totals, count)


def evaluate_all(
    recipe: Recipe,
    tasks: Sequence[Task],
    sites: Sequence[Rows],
    privacy: Privacy,
    device: str = "cpu",
) -> list[Report]:
    """Return what `evaluate` returns for each of a round's tasks, in one pass over all rows.

    `tasks`, one at least, share one brief; `sites` holds the rows of each. Raises as `evaluate`
    does; then each site may be asked alone.
    """
    private = privacy.in_training
    event = evaluation_event(privacy) if private else None
    model = recipe.build().to(device).eval()
    bind(model, tasks[0].brief.params.to(device).clone())
    everyone = Rows(torch.cat([rows.x for rows in sites]), torch.cat([rows.y for rows in sites]))
    try:
        scores = _scores(recipe, model, everyone, device, alone=private)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise TaskFailed(f"round {tasks[0].round}: {error}") from error
    for name, values in scores.items():
        if len(values) != len(everyone):
            raise ConfigError(f"score {name!r}: {len(values)} values for {len(everyone)} rows")
    counts = [len(rows) for rows in sites]
    parts = {name: values.split(counts) for name, values in scores.items()}
    reports = []
    for number, (task, count) in enumerate(zip(tasks, counts, strict=True)):
        own = {name: values[number] for name, values in parts.items()}
        if event is not None:
            totals, told = noisy_totals(own, count, event.epsilon, SecureNoise())
        else:
            totals, told = _totals(own, count), float(count)
        reports.append(Report(task.id, task.round, task.site, totals, told))
    return reports


def mean_scores(reports: Sequence[Report]) -> Mapping[str, float]:
    """Return each score's mean over all the rows of all the reports that have it.

    The order of reports does not matter. Noise may push a mean out of [0, 1], or the count
    below 1; both are brought back, which is free after the noise.
    """
    names = sorted({name for report in reports for name in report.totals})
    means = {}
    for name in names:
        having = [report for report in reports if name in report.totals]
        total = math.fsum(report.totals[name] for report in having)
        count = math.fsum(report.count for report in having)
        means[name] = min(1.0, max(0.0, total / max(count, 1.0)))
    return means


def _scores(
    recipe: Recipe, model: nn.Module, rows: Rows, device: str, *, alone: bool
) -> dict[str, Tensor]:
    """Return each score's values, a row's from that row `alone` if it must be so."""

    def of_one(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {n: v.reshape(()) for n, v in recipe.score(output[None], target[None]).items()}

    parts: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for start in range(0, max(len(rows), 1), _CHUNK):
            x, y = (part[start : start + _CHUNK].to(device) for part in (rows.x, rows.y))
            if alone and len(x):
                scored: Mapping[str, Tensor] = vmap(of_one)(model(x), y)
            else:
                scored = recipe.score(model(x), y)
            for name, values in scored.items():
                parts.setdefault(name, []).append(values.double().cpu().reshape(-1))
    return {name: torch.cat(values) for name, values in parts.items()}


def _totals(scores: Mapping[str, Tensor], rows: int) -> dict[str, float]:
    for name, values in scores.items():
        if len(values) != rows:
            raise ConfigError(f"score {name!r}: {len(values)} values for {rows} rows")
        wrong = ~((values >= 0) & (values <= 1))
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise ConfigError(
                f"score {name!r} of row {first} is {float(values[first])}: a score lies in [0, 1]; "
                "did training diverge?"
            )
    return {name: float(values.sum()) for name, values in scores.items()}
