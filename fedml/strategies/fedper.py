"""FedPer: Arivazhagan et al. 2019, arXiv:1912.00818, algorithms 1 and 2.

Named parameters (a model's last layers) stay at home: each site trains all of its model, keeps the
named ones and sends the others, which the server averages as FedAvg does. A site starts from the
global model with its own of the named parameters, and is scored with them. Invariants: naming
nothing is FedAvg; of what is named zeros travel, so it never moves in the global model, and a
release holds it as it was at the start. Under DP-SGD what stays at home costs what the rest costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from fedml.errors import ConfigError
from fedml.params import Layout, Params
from fedml.protocol.tasks import Brief, Slots
from fedml.strategies.base import Aggregate, Reducer, ServerState, check_setting
from fedml.strategies.fedavg import FedAvg
from fedml.strategies.reducers import WeightedMean

NAMED, LIKELY = 1.0, 0.0  # of a pattern: it must match a name, it may


@dataclass(frozen=True)
class FedPer:
    """FedAvg of all parameters but those that `home` names, by patterns such as `head.*`."""

    home: tuple[str, ...] = ()
    server_lr: float = 1.0
    reducer: Reducer = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        object.__setattr__(self, "home", tuple(self.home))
        check_setting("fedper.server_lr", self.server_lr, open_=True)

    def misfits(self, params: Params, rounds: int) -> Iterator[str]:
        """Say which patterns name nothing, or that they name all there is."""
        yield from unnamed(params.layout, self.home)

    def start(self, params: Params) -> ServerState:
        """Start from `params`, with no slots."""
        return ServerState(params)

    def brief(self, state: ServerState) -> Brief:
        """Send the model, and what of it stays at home."""
        return Brief(state.params, rule="home", settings=dict.fromkeys(self.home, NAMED))

    def advance(self, state: ServerState, total: Aggregate) -> ServerState:
        """Advance as FedAvg does; what stays at home is told to be zero."""
        return FedAvg(self.server_lr).advance(state, total)


class Home:
    """Keeps the parameters whose names match a pattern among the settings; sends zeros for them."""

    reports: frozenset[str] = frozenset()

    def begin(self, brief: Brief, memory: Slots) -> Params:
        """Return the global model with the site's own of the named parameters."""
        masks = masks_of(brief.params.layout, brief.settings)
        return mixed(masks, memory["home"], brief.params) if memory else brief.params

    def gradient(self, brief: Brief, memory: Slots, params: Params, grads: Params) -> Params:
        """Return `grads` unchanged."""
        return grads

    def finish(
        self, brief: Brief, memory: Slots, delta: Params, path: Mapping[str, float]
    ) -> tuple[Slots, Slots]:
        """Report the delta of what travels, and keep what does not."""
        masks, nothing = masks_of(delta.layout, brief.settings), delta.zeros()
        if not masks:
            return {}, {}
        own = mixed(masks, self.begin(brief, memory) + delta, nothing)
        return {"delta": mixed(masks, nothing, delta)}, {"home": own}


def masks_of(layout: Layout, patterns: Mapping[str, float]) -> dict[torch.dtype, Tensor]:
    """Return true where a name matches, by dtype; raises `ConfigError` if a sure one has none."""
    masks: dict[torch.dtype, Tensor] = {}
    for pattern, sure in patterns.items():
        names = [name for name in layout.places if fnmatchcase(name, pattern)]
        if sure and not names:
            raise ConfigError(
                f"strategy.home {pattern!r} matches no parameter; there are {_some(layout)}"
            )
        for name in names:
            dtype, first, end, _ = layout.places[name]
            mask = masks.setdefault(dtype, torch.zeros(layout.sizes[dtype], dtype=torch.bool))
            mask[first:end] = True
    return masks


def unnamed(layout: Layout, home: Sequence[str]) -> Iterator[str]:
    """Say which patterns of `home` name no parameter, or that nothing is left to travel."""
    for pattern in home:
        try:
            masks_of(layout, {pattern: NAMED})
        except ConfigError as error:
            yield f"{error}, name one of them or leave it out"
    if home and all(any(fnmatchcase(name, each) for each in home) for name in layout.places):
        yield (
            f"strategy.home {[*home]} names every parameter, so nothing travels and nothing is "
            "learnt together; name the last layers alone"
        )


def mixed(masks: Mapping[torch.dtype, Tensor], home: Params, away: Params) -> Params:
    """Return what is named from `home`, and the rest from `away`."""
    buffers = dict(away.buffers)
    for dtype, mask in masks.items():
        there = buffers[dtype]
        buffers[dtype] = torch.where(mask.to(there.device), home.buffers[dtype], there)
    return Params.over(away.layout, buffers)


def _some(layout: Layout) -> str:
    names: Sequence[str] = sorted(layout.places)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
