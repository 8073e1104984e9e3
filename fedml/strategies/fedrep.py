"""FedRep: Collins et al. 2021, arXiv:2102.07089, algorithm 1.

Named parameters (a model's last layers, its head) stay at home, as in FedPer, and the others, which
make the representation, are averaged. But they are not trained at once: of a task's steps the first
`head_steps` move the head alone, over the representation as it came, and the others move what
travels alone, under the head as it then is. The paper has many of the first and one pass, or one
step, of the others. Invariants: naming nothing is FedAvg; the representation of a task of
`head_steps` steps or fewer does not move. Under DP-SGD a step costs what it costs in FedAvg.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fedml.errors import ConfigError
from fedml.params import Params
from fedml.protocol.messages import Training
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting, number
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.fedper import NAMED, Home, masks_of, mixed, unnamed
from fedml.strategies.reducers import WeightedMean

_FIRST = ":head_steps"  # no parameter's name has a colon


@dataclass(frozen=True)
class FedRep:
    """FedPer whose sites train what `home` names first, and then what travels."""

    home: tuple[str, ...] = ()
    head_steps: int = 1
    server_lr: float = 1.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        object.__setattr__(self, "home", tuple(self.home))
        check_setting("fedrep.server_lr", self.server_lr, open_=True)
        if self.head_steps < 1:
            raise ConfigError(f"fedrep.head_steps {self.head_steps}: must be 1 or more steps")

    def objections(self, training: Training) -> Iterator[str]:
        """Say what would move out of turn, or have no turn."""
        if training.momentum:
            yield _moved_on(training.momentum)
        if self.home and 0 < training.steps <= self.head_steps:
            yield (
                f"strategy.head_steps {self.head_steps} with training.steps {training.steps}: none "
                "is left for what travels; raise training.steps, or lower head_steps"
            )

    def misfits(self, params: Params, rounds: int) -> Iterator[str]:
        """Say which patterns name nothing, or that they name all there is."""
        yield from unnamed(params.layout, self.home)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model, what of it stays at home, and for how many steps that is trained."""
        settings = {**dict.fromkeys(self.home, NAMED), _FIRST: float(self.head_steps)}
        return Brief(state.params, rule="fedrep", settings=settings)

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Advance as FedAvg does; what stays at home is told to be zero."""
        return FedAvg(self.server_lr).advance(state, total)


class Alternate:
    """Keeps what is named, trains it first, and sends zeros for it."""

    reports: frozenset[str] = frozenset()

    def begin(self, brief: Brief, memory: Slots) -> Params:
        """Return the global model with the site's own of the named parameters."""
        return Home().begin(*_as_home(brief, memory))

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return `grads` with zeros for what has not its turn."""
        masks, nothing = masks_of(params.layout, _as_home(brief, memory)[0].settings), grads.zeros()
        if not masks:
            return grads
        done = float(memory["done"]["value"]) if "done" in memory else 0.0
        head = done < brief.settings[_FIRST]
        return mixed(masks, grads, nothing) if head else mixed(masks, nothing, grads)

    def follow(self, brief: Brief, memory: Slots, params: Params, steps: int) -> Slots:
        """Remember how many steps the task has taken."""
        return {**memory, "done": number(steps)}

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report the delta of what travels, and keep what does not.

        Raises `ConfigError` with momentum, which would go on moving what has had its turn.
        """
        if path.get("momentum"):
            raise ConfigError(_moved_on(path["momentum"]))
        return Home().finish(*_as_home(brief, memory), delta, path)


def _moved_on(momentum: float) -> str:
    return (
        f"strategy fedrep with training.momentum {momentum}: it would go on to move the head while "
        "the representation is trained, set it to 0"
    )


def _as_home(brief: Brief, memory: Slots) -> tuple[Brief, Slots]:
    """Return brief and memory as FedPer's site half knows them."""
    names = {name: sure for name, sure in brief.settings.items() if name != _FIRST}
    kept = {name: slot for name, slot in memory.items() if name == "home"}
    return Brief(brief.params, "home", names, brief.slots), kept
