"""The one local training loop: from a task and a site's rows to an update."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedml.errors import ConfigError, Refused, TaskFailed
from fedml.learning.descent import Descent, find_rule
from fedml.learning.gradients import Precision
from fedml.learning.on_cpu import tune
from fedml.learning.private import PrivateGradient
from fedml.learning.recipe import Recipe, Rows
from fedml.learning.views import Contrasted
from fedml.params import Params
from fedml.privacy.accounting import SampledGaussian, own_share, training_event, unit_of
from fedml.privacy.central import bounded
from fedml.privacy.shares import grain_of, hidden
from fedml.protocol.messages import Privacy, Training
from fedml.protocol.tasks import Brief, Slots, Task, Update
from fedml.strategies import (
    STATISTICS,
    Contrast,
    LocalRule,
    Sample,
    first_model,
    is_twofold,
    own_model,
)

_AT_ONCE = 4096  # rows whose loss is looked at together


def batches(rows: int, training: Training, seed: int) -> Iterator[Tensor | slice]:
    """Yield the row indices of each step of plain training, the same for the same seed.

    Each pass over the rows is shuffled anew; its last batch may be short. A batch of all rows
    is a slice, in the rows' own order.
    """
    size = training.batch_size or rows
    passes = range(training.epochs) if training.epochs else itertools.count()
    steps = training.steps or math.inf
    generator = None if size >= rows else torch.Generator().manual_seed(seed)
    done = 0
    for _ in passes:
        if generator is None:
            parts: tuple[Tensor | slice, ...] = (slice(None),)
        else:
            parts = torch.split(torch.randperm(rows, generator=generator), size)
        for part in parts:
            if done >= steps:
                return
            done += 1
            yield part


@dataclass(frozen=True)
class Trainer:
    """Trains a recipe as `training` says, under `privacy`, on `device`.

    Under privacy, one call is one `training_event`: it must be charged before the update leaves,
    and called again it is another release. In mode "site_central" the update is clipped as a
    whole, and the coordinator's to make noisy; in mode "site_distributed" it has a share of the
    noise. With precision "bf16" the model runs under autocast, and its parameters, their
    gradients and the loss stay float32. A model is built once and copied for each task, so no
    task sees what another left in it. `copy` gives the memory that a task trains in, and in
    which its delta comes to lie.
    """

    recipe: Recipe
    training: Training
    privacy: Privacy
    device: str = "cpu"
    precision: Precision = "fp32"
    copy: Callable[[Params], Params] = Params.clone

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ConfigError(f"precision {self.precision!r}: use one of {get_args(Precision)}")
        if self.precision != "fp32" and self.privacy.mode != "none":
            raise ConfigError(
                f"precision {self.precision}: rows' gradients are clipped and noised in fp32; "
                "set precision=fp32 or privacy=none"
            )

    def train(
        self,
        task: Task,
        rows: Rows,
        memory: Slots,
        *,
        seed: int,
        public_rows: int | None = None,
    ) -> tuple[Update, Slots]:
        """Return the update, and the memory to hand in at this site's next task.

        On a CPU, plain training gives the same bytes for the same inputs; `seed` orders batches
        and drops out, and never touches privacy noise. Under privacy the update weighs
        `public_rows` (of patients, in mode "patient") and its metrics hold no number made from
        rows. Raises `Refused` for a rule this site lacks, `ConfigError` for a recipe unfit for
        the mode, `TaskFailed` if the work breaks or diverges.
        """
        if task.brief.rule in STATISTICS:
            return self._measure(task, rows), memory
        if self.privacy.mode == "site_distributed":
            whole, kept = self._hidden(task, rows, memory, seed)
            step, like = grain_of(self.training, self.privacy), task.brief.params
            noised = Params({name: (whole[name] * step).to(t.dtype) for name, t in like.items()})
            return Update(task.id, task.round, task.site, noised, 1.0), kept
        rule = find_rule(task.brief.rule)
        check_share(self.privacy, task.brief)
        self._check_bounded(task, rule)
        reads_loss = getattr(rule, "reads_loss", False)
        if reads_loss:
            self._check_exact(task)
        device = torch.device(self.device)
        memory = {name: slot.to(device) for name, slot in memory.items()}
        brief = on_device(task.brief, device)
        with seeded(seed, device), _failures_named(task):
            model = self._fresh().to(device).train()
            x, y = rows.x.to(device), rows.y.to(device)
            start = first_model(brief, memory)
            descent = Descent(model, brief, memory, self.training, self.copy, start=start)
            path = {"loss": self._loss(model, Rows(x, y))} if reads_loss else {}
            if self.privacy.in_training:
                whose = Rows(x, y, rows.groups)
                delta, weight, metrics = self._privately(descent, whose, public_rows)
            else:
                added = self._contrast(rule, descent)
                delta, weight, metrics = self._plainly(descent, Rows(x, y), seed, added)
            memory = descent.memory
            if is_twofold(brief):
                memory = {**memory, "own": self._own(brief, memory, Rows(x, y), seed)}
        path |= path_of(self.training, descent.steps)
        told, kept = rule.finish(brief, memory, delta, path)
        slots = {name: slot.to("cpu") for name, slot in told.items()}
        sent = slots.pop("delta", delta.to("cpu"))
        if self.privacy.mode == "site_central":
            sent, weight, metrics = _bound(task, sent, slots, self.privacy.clip), 1.0, {}
        update = Update(task.id, task.round, task.site, sent, weight, slots, metrics)
        return update, {name: slot.to("cpu") for name, slot in kept.items()}

    def share(
        self, task: Task, rows: Rows, memory: Slots, *, seed: int, public_rows: int
    ) -> tuple[Mapping[str, Tensor], Slots]:
        """Return what `train` would make its update of, where sites share the noise of a sum.

        By tensor, the noised sum of clipped gradients, or the noised update, in whole steps of
        the noise's grid: float64, on the CPU. Raises as `train` does; it is one release, as that.
        """
        if self.privacy.mode == "site_distributed":
            return self._hidden(task, rows, memory, seed)
        if self.privacy.mode != "record_distributed":
            raise ConfigError(f"privacy.mode {self.privacy.mode!r}: its sites share no noise")
        check_share(self.privacy, task.brief)
        device = torch.device(self.device)
        brief = on_device(task.brief, device)
        with seeded(seed, device), _failures_named(task):
            model = self._fresh().to(device).train()
            x, y = rows.x.to(device), rows.y.to(device)
            descent = Descent(model, brief, {}, self.training, self.copy)
            gradient, _ = self._private(descent, Rows(x, y, rows.groups), public_rows)
            sums = gradient.whole()
            first = {id(p): name for name, p in descent.trainable.items()}  # of its names
            every = model.named_parameters(remove_duplicate=False)
            return {name: sums[first[id(p)]] for name, p in every if p.requires_grad}, {}

    def _hidden(self, task: Task, rows: Rows, memory: Slots, seed: int) -> tuple[Params, Slots]:
        """Return a site's whole update with its share of noise on it, in steps of the grid."""
        update, kept = self._bounding.train(task, rows, memory, seed=seed)
        return hidden(update.delta, grain_of(self.training, self.privacy)), kept

    @cached_property
    def _bounding(self) -> Trainer:
        """The same, without the noise: a site's update is bounded alike, whoever adds it."""
        return replace(self, privacy=replace(self.privacy, mode="site_central", sharers=0))

    def _build(self) -> nn.Module:
        with seeded(0, torch.device("cpu")):  # whichever task it is built for
            return self.recipe.build()

    @cached_property
    def _pristine(self) -> nn.Module:
        return self._build()

    def _fresh(self) -> nn.Module:
        """Return a model as the recipe builds it, for one task.

        Its parameters are new ones over shared storage: give them data of their own, as `bind`
        does, and do not write to them before.
        """
        pristine = self._pristine
        memo: dict[int, object] = {
            id(one): nn.Parameter(one.detach(), one.requires_grad) for one in pristine.parameters()
        }
        try:
            return copy.deepcopy(pristine, memo)
        except (RuntimeError, TypeError):  # it holds what cannot be copied
            return self._build()

    def _forward(self, model: nn.Module, x: Tensor) -> Tensor:
        if x.ndim == 4 and self._takes_channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with self._arithmetic(x.device):
            output: Tensor = model(x)
        return output if self.precision == "fp32" else output.float()

    def _arithmetic(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @cached_property
    def _takes_channels_last(self) -> bool:
        """True if images may come channels last, in which convolutions and pooling are quicker.

        A model that calls `view` on a convolution's output takes them in no other order.
        """
        x = self.recipe.example(2).contiguous(memory_format=torch.channels_last)
        with seeded(0, x.device), self._arithmetic(x.device), torch.no_grad():
            try:
                self._fresh()(x)
            except RuntimeError:
                return False
        return True

    def _measure(self, task: Task, rows: Rows) -> Update:
        """Return what a statistic reports of all rows at once, in evaluation mode."""
        self._check_exact(task)
        if len(rows) == 0:
            raise ConfigError("there are no rows to measure; check the site's data file")
        device = torch.device(self.device)
        model = self._fresh().to(device).eval()
        x, y = rows.x.to(device), rows.y.to(device)

        def outputs(params: Params) -> Tensor:
            found: Tensor = functional_call(model, dict(params), (x,))
            return found

        sample = Sample(x, y, outputs, self.recipe.loss)
        brief = on_device(task.brief, device)
        Params(model.state_dict()).check_like(brief.params)
        with _failures_named(task):
            delta, slots = STATISTICS[brief.rule].measure(brief, sample)
            with torch.no_grad():
                metrics = {"loss": float(sample.loss(brief.params))}
        return Update(
            task.id,
            task.round,
            task.site,
            delta.to("cpu"),
            float(len(rows)),
            {name: slot.to("cpu") for name, slot in slots.items()},
            metrics,
        )

    def _check_exact(self, task: Task) -> None:
        if self.privacy.mode != "none":
            raise Refused(
                f"rule {task.brief.rule} reports exact numbers made of rows, which "
                f"{self.privacy.mode} privacy forbids; use privacy=none, or strategy=fedavg"
            )

    def _check_bounded(self, task: Task, rule: LocalRule) -> None:
        if self.privacy.in_training and isinstance(rule, Contrast):
            raise Refused(
                f"rule {task.brief.rule} adds to the loss what no row's part in is bounded, which "
                f"{self.privacy.mode} privacy forbids; use strategy=fedavg, or privacy=none"
            )

    def _loss(self, model: nn.Module, rows: Rows) -> float:
        """Return the mean loss over all rows where `model` stands, in evaluation mode."""
        total = 0.0
        model.eval()
        with torch.no_grad():
            for x, y in zip(rows.x.split(_AT_ONCE), rows.y.split(_AT_ONCE), strict=True):
                total += float(self.recipe.loss(self._forward(model, x), y)) * len(x)
        model.train()
        return total / max(len(rows), 1)

    def _contrast(self, rule: LocalRule, descent: Descent) -> Contrasted | None:
        """Return what a rule adds to the loss; looks at the model even where that is nothing."""
        if not isinstance(rule, Contrast):
            return None
        brief, device = descent.brief, torch.device(self.device)
        example = self.recipe.example(2).to(device)
        others = [
            (self._fresh().to(device), params) for params in rule.others(brief, descent.memory)
        ]
        contrast = Contrasted(rule, brief, descent.model, others, example)
        return contrast if others else None

    def _plainly(
        self, descent: Descent, rows: Rows, seed: int, added: Contrasted | None = None
    ) -> tuple[Params, float, dict[str, float]]:
        if len(rows) == 0:
            raise ConfigError("there are no rows to train on; check the site's data file")
        losses: list[Tensor] = []
        if rows.x.device.type == "cpu":
            images = rows.x.ndim == 4 and self._takes_channels_last
            tune(descent.model, channels_last=images)
        for batch in batches(len(rows), self.training, seed):
            x = rows.x[batch]
            loss = self.recipe.loss(self._forward(descent.model, x), rows.y[batch])
            losses.append(loss.detach())
            descent.descend(loss if added is None else loss + added.term(self._forward, x))
        delta = descent.moved()
        path = torch.stack(losses)
        if not (delta.is_finite() and bool(path.isfinite().all())):
            bad = (~path.isfinite()).nonzero()
            raise diverged(int(bad[0]) + 1 if len(bad) else descent.steps, descent.steps)
        return delta, float(len(rows)), {"loss": float(path.double().mean())}

    def _own(self, brief: Brief, memory: Slots, rows: Rows, seed: int) -> Params:
        """Return what becomes of the model that stays with the site.

        Where that a site failed would tell of rows, one that diverges begins again silently.
        """
        start, device = own_model(brief, memory), rows.x.device
        model = self._fresh().to(device).train()
        descent = Descent(model, brief, memory, self.training, start=start, own=True)
        try:
            with seeded(seed, device):
                delta, _, _ = self._plainly(descent, rows, seed)
        except (TaskFailed, ConfigError):
            if self.privacy.mode == "none":
                raise
            return brief.params
        return start + delta

    def _privately(
        self, descent: Descent, rows: Rows, public_rows: int | None
    ) -> tuple[Params, float, dict[str, float]]:
        if public_rows is None:
            raise ConfigError("public_rows is missing: under privacy a site declares its row count")
        gradient, event = self._private(descent, rows, public_rows)
        for _ in range(event.steps):
            gradient.fill()
            descent.step()
        delta = descent.moved()
        for name, _ in descent.model.named_buffers():
            if name in delta:
                delta[name].zero_()  # whatever a buffer picked up stays here
        if not delta.is_finite():
            raise diverged(descent.steps, descent.steps)
        metrics = {"steps": float(event.steps), "noise_multiplier": event.noise}
        return delta, float(public_rows), metrics

    def _private(
        self, descent: Descent, rows: Rows, public_rows: int
    ) -> tuple[PrivateGradient, SampledGaussian]:
        """Return what fills private steps, and the event that they are accounted for as."""
        event = training_event(self.training, self.privacy, public_rows)
        gradient = PrivateGradient(
            self.recipe,
            descent,
            rows,
            event=own_share(event, self.privacy),
            clip=self.privacy.clip,
            public_rows=public_rows,
            unit=unit_of(self.privacy.mode),
        )
        return gradient, event


def check_share(privacy: Privacy, brief: Brief) -> None:
    """Raise `Refused` if a site with a share of the noise would report more than its sum."""
    if privacy.mode == "record_distributed" and brief.rule != "plain":
        raise Refused(
            f"rule {brief.rule} in mode record_distributed: the noise is that of a sum of plain "
            "gradients, with nothing beside it; use strategy=fedavg"
        )


def _bound(task: Task, delta: Params, slots: Slots, clip: float) -> Params:
    """Return all that a whole site may say under site-level privacy."""
    if slots:
        raise Refused(
            f"rule {task.brief.rule} reports {sorted(slots)} beside the delta, which the clip of a "
            "whole site's update does not bound; use strategy=fedavg"
        )
    return bounded(delta, clip)


def path_of(training: Training, steps: int) -> dict[str, float]:
    """Return what a rule is told at its finish of the `steps` taken."""
    return {"lr": training.lr, "momentum": training.momentum, "steps": float(steps)}


def diverged(step: int, steps: int) -> TaskFailed:
    """Return the failure of training that left the finite numbers at `step` of `steps`."""
    return TaskFailed(
        f"training left the finite numbers at step {step} of {steps}; "
        "lower training.lr or check the scaling of the inputs"
    )


def on_device(brief: Brief, device: torch.device) -> Brief:
    """Return the brief with its tensors on `device`."""
    slots = {name: slot.to(device) for name, slot in brief.slots.items()}
    return Brief(brief.params.to(device), brief.rule, brief.settings, slots)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators (weights, dropout) within, and leave the caller's alone."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _failures_named(task: Task) -> Iterator[None]:
    """Turn what torch raises into `TaskFailed`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TaskFailed(
            f"task {task.id}: out of memory; lower training.batch_size or use a larger device"
        ) from error
    except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
        line = str(error).strip().splitlines()
        raise TaskFailed(f"task {task.id}: {line[0] if line else type(error).__name__}") from error
