"""The same tasks on Ray, for when one machine is too small."""

from __future__ import annotations

import importlib
import os
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedml.errors import ConfigError
from fedml.learning.gradients import Precision
from fedml.learning.recipe import Recipe
from fedml.params import Params, decode, encode
from fedml.protocol.messages import SiteId
from fedml.protocol.tasks import Brief, Slots, Task, Update
from fedml.rounds import Plan, SiteLost
from fedml.simulation.executors.base import Answer, Holding, Memory
from fedml.simulation.executors.inline import Inline

_TRIES = 2  # workers that may be lost with a task before its site is given up
_AHEAD = 2  # tasks in a worker's hands, so that it never waits for the next
_PROMPT = 20.0  # seconds in which an actor that has nothing to do answers
_NONE = Params({})
_IDLE: dict[str, list[Any]] = {}  # actors without an executor, by Ray's job
Packed = npt.NDArray[np.uint8]  # a safetensors file; Ray maps arrays and copies nothing


@dataclass
class Cluster:
    """Spreads tasks over Ray actors of one core and one thread each, on all of its machines.

    `address` is a running cluster's; without one, Ray starts on this machine, reachable from
    nowhere else. With `workers` None there is one for every core of the cluster. Recipe and rows
    lie once in each machine's object store, a round's brief likewise. A task whose worker is lost
    goes to another once; then its site is lost. Workers serve the next executor too, as in a sweep,
    and end with this process. Answers have the bytes of an `Inline` with one thread, where
    machines are alike.
    """

    plan: Plan
    recipe: Recipe
    holdings: Mapping[SiteId, Holding]
    memory: Memory = field(default_factory=Memory)
    workers: int | None = None
    address: str | None = None
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"executor.workers {self.workers}: must be 1 or more, or null")
        inline = Inline(self.plan, self.recipe, self.holdings, Memory(), precision=self.precision)
        self._ray = _connect(self.address)
        _carry(self._ray, type(self.recipe).__module__)
        self._stage = self._ray.put(inline)
        self._hands: list[_Hand] = []
        weakref.finalize(self, _dismiss, self._ray, self._hands)

    def run(self, tasks: Sequence[Task]) -> Iterator[Answer]:
        """Yield answers as they come."""
        backlog = deque(_Job(task) for task in tasks)
        briefs: dict[int, Any] = {}
        under_way: dict[Any, tuple[_Hand, _Job]] = {}
        try:
            while backlog or under_way:
                self._fill_up()
                self._hand_out(backlog, briefs, under_way)
                (ready,), _ = self._ray.wait([*under_way], num_returns=1)
                hand, job = under_way.pop(ready)
                hand.jobs -= 1
                answer = self._hear(ready, hand, job, backlog)
                if answer is not None:
                    yield answer
        finally:
            for reference in under_way:
                self._ray.cancel(reference)

    def _hand_out(
        self,
        backlog: deque[_Job],
        briefs: dict[int, Any],
        under_way: dict[Any, tuple[_Hand, _Job]],
    ) -> None:
        for ahead in range(_AHEAD):
            for hand in self._hands:
                if backlog and hand.jobs <= ahead:
                    job = backlog.popleft()
                    brief, memory = job.task.brief, self.memory.of(job.task)
                    if id(brief) not in briefs:
                        briefs[id(brief)] = self._ray.put(_pack({"": brief.params, **brief.slots}))
                    bare = replace(job.task, brief=replace(brief, params=_NONE, slots={}))
                    slots = _pack(memory.slots.get(job.task.site, {}))
                    reference = hand.actor.do.remote(
                        bare, briefs[id(brief)], slots, memory.releases
                    )
                    job.tries, hand.jobs = job.tries + 1, hand.jobs + 1
                    under_way[reference] = (hand, job)

    def _hear(
        self, reference: object, hand: _Hand, job: _Job, backlog: deque[_Job]
    ) -> Answer | None:
        """Return what a worker has to say; None if it is gone and another shall try."""
        task = job.task
        try:
            answer, tensors, kept, releases = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            return SiteLost(task.site, str(error.cause).splitlines()[0], False, task.id)
        except self._ray.exceptions.RayError:
            if hand in self._hands:
                self._hands.remove(hand)
            if job.tries < _TRIES:
                backlog.appendleft(job)
                return None
            reason = f"its worker was lost, {_TRIES} times over; look at the cluster's machines"
            return SiteLost(task.site, reason, False, task.id)
        self.memory.releases.update(releases)
        if isinstance(answer, Update):
            self.memory.slots[task.site] = _unpack(kept)
            slots = _unpack(tensors)
            return replace(answer, delta=slots.pop("delta"), slots=slots)
        return answer  # type: ignore[no-any-return]

    def _fill_up(self) -> None:
        cores = int(self._ray.cluster_resources().get("CPU", 0))
        wanted = min(self.workers or cores, cores, max(1, len(self.holdings)))
        if wanted < 1:
            raise ConfigError("the Ray cluster has no CPU left; add machines or lower num_cpus")
        while len(self._hands) < wanted:
            self._hands.append(_Hand(_engage(self._ray, self._stage)))


@dataclass
class _Job:
    task: Task
    tries: int = 0


@dataclass(eq=False)
class _Hand:
    """An actor, and how many jobs it has been given."""

    actor: Any
    jobs: int = 0


class _Worker:
    """What runs in an actor; it works for one executor after another."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def serve(self, inline: Inline) -> None:
        """Do from now on what `inline` does."""
        self._inline = inline

    def do(
        self, task: Task, brief: Packed, slots: Packed, releases: dict[tuple[SiteId, str], int]
    ) -> tuple[Answer, Packed, Packed, dict[tuple[SiteId, str], int]]:
        """Return the answer without its tensors, these, and what the site remembers."""
        parts, kept = _unpack(brief), _unpack(slots)
        whole = Brief(parts.pop(""), task.brief.rule, task.brief.settings, parts)
        memory = Memory({task.site: kept} if kept else {}, releases)
        self._inline.memory = memory
        (answer,) = self._inline.run([replace(task, brief=whole)])
        if not isinstance(answer, Update):
            return answer, _pack({}), _pack({}), memory.releases
        tensors = _pack({"delta": answer.delta, **answer.slots})
        bare = replace(answer, delta=_NONE, slots={})
        return bare, tensors, _pack(memory.slots.get(task.site, {})), memory.releases


def _engage(ray: Any, stage: Any) -> Any:  # noqa: ANN401
    """Return an actor that serves `stage`: one that was dismissed if there is one, or a new one.

    Starting one means importing torch, which takes longer than many a small run.
    """
    session = ray.get_runtime_context().get_job_id()
    idle = _IDLE.setdefault(session, [])
    while idle:
        actor = idle.pop()
        try:
            ray.get(actor.serve.remote(stage), timeout=_PROMPT)
        except ray.exceptions.RayError:  # it went with its machine, or never got one
            ray.kill(actor)
            continue
        return actor
    actor = ray.remote(num_cpus=1, max_restarts=0)(_Worker).remote()
    actor.serve.remote(stage)
    return actor


def _dismiss(ray: Any, hands: list[_Hand]) -> None:  # noqa: ANN401
    """Keep the actors that have nothing to do for the next executor; end the others."""
    if not ray.is_initialized():
        return
    idle = _IDLE.setdefault(ray.get_runtime_context().get_job_id(), [])
    for hand in hands:
        if hand.jobs:
            ray.kill(hand.actor)
        else:
            idle.append(hand.actor)


def _pack(parts: Slots) -> Packed:
    return np.frombuffer(b"".join(encode(parts)) if parts else b"", np.uint8)


def _unpack(packed: Packed) -> dict[str, Params]:
    return decode(packed.data) if len(packed) else {}


def _connect(address: str | None) -> Any:  # noqa: ANN401 - ray is an extra, and has no types
    """Return the module `ray`, connected; raises `ConfigError` if it is missing or cannot."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would phone home
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("ray is missing: pip install 'fedml-consortium[ray]'") from error
    if not ray.is_initialized():
        local = {} if address else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=40, **local)
        except (ConnectionError, RuntimeError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise ConfigError(f"executor.address {address}: no Ray cluster ({line})") from error
    return ray


def _carry(ray: Any, module: str) -> None:  # noqa: ANN401
    """Send a recipe's module along with it if workers could not import it by its name."""
    if module == "__main__" or module not in sys.modules:
        return  # sent by value as it is
    if getattr(sys.modules[module], "__spec__", None) is None:
        ray.cloudpickle.register_pickle_by_value(sys.modules[module])
