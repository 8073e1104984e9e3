"""Updates and reports as parts of a masked vector, and the sum of such vectors as one answer.

A delta and each slot are a part for each of their dtypes; a slot that is one number, or not
shaped like the model, metrics and scores are fine parts. Where the plain mean takes the largest
of integer buffers (a batch counter, say), a masked sum has their mean, rounded.

Where sites share the noise of their sum, what a site puts in is the noised sum of its rows' clipped
gradients, or its clipped update, in steps of the noise's own grid, the same at all sites: whole
numbers, which add up exactly. Learning rate and weights follow the sum, so nothing that was made
of one site's share alone, as a rounded float would be, is ever added up. Nothing else is in such
a vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedml.errors import MalformedUpdate, RoundFailed
from fedml.params import Layout, Params
from fedml.protocol.messages import Scores
from fedml.protocol.secagg import Part, Secagg
from fedml.protocol.tasks import Brief, Report, Update
from fedml.secagg.masking import Floats, Total
from fedml.strategies import NUMBER, Aggregate, numbers, reports, wide

_WIDE = (torch.float32, torch.float64)  # what numpy and a `Total` deal in as it is
_NUMBER_CLIP = 2.0**20  # of a slot that is one number, a count of steps say; it is fine
_INTEGER_CLIP = 2.0**16  # of a batch counter's delta
_NOISED = "noised"  # the part of a vector whose noise is shared
_CLIPPED = "clipped"  # metric: which share of an update's numbers was beyond the clip


def parts_of(brief: Brief, settings: Secagg, *, shared: bool = False) -> tuple[Part, ...]:
    """Return the parts of a masked update that answers `brief`; `shared` as the noise may be."""
    if shared:
        sizes = brief.params.layout.sizes
        return tuple(Part(_name(_NOISED, d), size, 1.0, whole=True) for d, size in sizes.items())
    parts = [
        Part(_name(slot, dtype), size, settings.clip if dtype.is_floating_point else _INTEGER_CLIP)
        for slot, layout in _layouts(brief)
        for dtype, size in layout.sizes.items()
    ]
    parts += [Part(_name(slot), 1, _NUMBER_CLIP, fine=True) for slot in sorted(numbers(brief))]
    parts += [
        Part(_name(slot, dtype), size, settings.clip, fine=True)
        for slot, dtype, size in _wide(brief)
    ]
    for name, bound in _metrics(settings).items():
        parts += [Part(f"metric {name}", 1, bound, fine=True), _share(f"has {name}")]
    return tuple(parts)


def score_parts(settings: Secagg) -> tuple[Part, ...]:
    """Return the parts of a masked report: for each score its total and count, in shares of the
    weight cap. Noise may take both below 0 or beyond.
    """
    names = (f"{what} {name}" for name in settings.scores for what in ("total", "count"))
    return tuple(Part(name, 1, 4.0, fine=True) for name in names)


def numbers_of(update: Update, brief: Brief, settings: Secagg) -> dict[str, Floats]:
    """Return what a site puts into the sum; raises `MalformedUpdate` if it does not fit."""
    found = {"": update.delta, **update.slots}
    if update.slots.keys() != reports(brief):
        raise MalformedUpdate(f"it has slots {sorted(update.slots)}, not what {brief.rule} reports")
    values: dict[str, Floats] = {}
    floats: list[Floats] = []
    for slot, layout in _layouts(brief):
        brief.params.check_like(found[slot])
        for dtype in layout.sizes:
            values[_name(slot, dtype)] = array = _array(found[slot].buffers[dtype])
            floats += [array] if dtype.is_floating_point and len(array) else []
    for slot, layout in wide(brief.rule, brief.settings).items():
        layout.check_like(found[slot].layout)
    for slot, dtype, _ in _wide(brief):
        values[_name(slot, dtype)] = array = _array(found[slot].buffers[dtype])
        floats.append(array)
    for slot in numbers(brief):
        values[_name(slot)] = np.array([float(found[slot]["value"])])
    metrics = {**update.metrics, _CLIPPED: _beyond(floats, settings.clip)}
    for name in _metrics(settings):
        there = name in metrics and bool(np.isfinite(metrics[name]))
        values[f"metric {name}"] = np.array([metrics[name] if there else 0.0])
        values[f"has {name}"] = np.array([1.0 if there else 0.0])
    return values


def shares_of(whole: Mapping[str, Tensor], brief: Brief) -> dict[str, Floats]:
    """Return what a site puts into the sum whose noise it shares; raises `MalformedUpdate`.

    `whole` has the noised sums of trainable tensors' gradients, or an update, in steps of the
    grid; the other tensors stay where they are.
    """
    layout = brief.params.layout
    values = {dtype: np.zeros(size) for dtype, size in layout.sizes.items()}
    for name, steps in whole.items():
        dtype, start, end, shape = layout.places[name]
        if tuple(steps.shape) != shape or not torch.equal(steps, steps.round()):
            raise MalformedUpdate(f"{name}: a share of the sum is whole numbers of shape {shape}")
        values[dtype][start:end] = steps.reshape(-1).numpy()
    return {_name(_NOISED, dtype): array for dtype, array in values.items()}


def scores_of(report: Report, settings: Secagg) -> dict[str, Floats]:
    """Return what a site puts into the sum of scores, which it does with the weight cap."""
    values: dict[str, Floats] = {}
    for name in settings.scores:
        there, cap = name in report.totals, settings.weight_cap
        if there and not abs(report.count) <= 4 * cap:
            raise MalformedUpdate(f"count {report.count:g}: raise secagg.weight_cap {cap:g}")
        values[f"total {name}"] = np.array([report.totals[name] / cap if there else 0.0])
        values[f"count {name}"] = np.array([report.count / cap if there else 0.0])
    return values


def aggregate_of(
    total: Total, count: int, brief: Brief, settings: Secagg, grain: float = 0.0
) -> Aggregate:
    """Return the cohort's masked updates as one; `grain` as `privacy.shares` tells it."""
    means, weight = {}, total.weight * settings.weight_cap
    if grain:
        layout = brief.params.layout
        sums = {
            dtype: _mean(total, _name(_NOISED, dtype), dtype, size, grain / settings.weight_cap)
            for dtype, size in layout.sizes.items()
        }
        return Aggregate(Params.over(layout, sums), {}, weight, count, {})
    for slot, layout in _layouts(brief):
        buffers = {d: _mean(total, _name(slot, d), d, size) for d, size in layout.sizes.items()}
        means[slot] = Params.over(layout, buffers)
    for slot, layout in wide(brief.rule, brief.settings).items():
        buffers = {d: torch.from_numpy(total.mean(_name(slot, d))).to(d) for d in layout.sizes}
        means[slot] = Params.over(layout, buffers)
    for slot in numbers(brief):
        value = torch.tensor(total.mean(_name(slot))[0], dtype=torch.float64)
        means[slot] = Params.over(NUMBER, {torch.float64: value[None]})
    metrics = {}
    for name in sorted(_metrics(settings)):
        if (share := total.mean(f"has {name}")[0]) > 0:
            metrics[name] = float(total.mean(f"metric {name}")[0] / share)
    delta = means.pop("")
    return Aggregate(delta, means, weight, count, metrics)


def scores_in(total: Total, settings: Secagg) -> Scores:
    """Return each score's mean over all rows that were scored; see `answers.Reports`."""
    scores = {}
    for name in sorted(settings.scores):
        count = float(total.mean(f"count {name}")[0])
        if count > 0:
            mean = float(total.mean(f"total {name}")[0]) / count
            scores[name] = min(1.0, max(0.0, mean))
    if not scores:
        raise RoundFailed("the sites' counts add up to no rows; look at secagg.scores")
    return scores


def _layouts(brief: Brief) -> Iterator[tuple[str, Layout]]:
    """Yield the delta and each slot that is shaped like the model."""
    other = {*numbers(brief), *wide(brief.rule, brief.settings)}
    for slot in ("", *sorted(reports(brief) - other)):
        yield slot, brief.params.layout


def _wide(brief: Brief) -> Iterator[tuple[str, torch.dtype, int]]:
    """Yield the buffers of each slot that has a layout of its own."""
    for slot, layout in sorted(wide(brief.rule, brief.settings).items()):
        yield from ((slot, dtype, size) for dtype, size in layout.sizes.items())


def _metrics(settings: Secagg) -> Mapping[str, float]:
    return {**settings.metrics, _CLIPPED: 1.0}


def _share(name: str) -> Part:
    return Part(name, 1, 1.0, fine=True)


def _name(slot: str, dtype: torch.dtype | None = None) -> str:
    kind = str(dtype).removeprefix("torch.") if dtype else "number"
    return f"{slot or 'delta'}:{kind}"


def _array(buffer: Tensor) -> Floats:
    wide = buffer if buffer.dtype in _WIDE else buffer.to(torch.float64)
    found: Floats = wide.detach().cpu().numpy()
    return found


def _beyond(arrays: Sequence[Floats], clip: float) -> float:
    outside = (a for a in arrays if not (-clip <= a.min() and a.max() <= clip))
    return sum(int((np.abs(a) > clip).sum()) for a in outside) / max(1, sum(map(len, arrays)))


def _mean(total: Total, name: str, dtype: torch.dtype, size: int, factor: float = 1.0) -> Tensor:
    wide = torch.empty(size, dtype=dtype if dtype in _WIDE else torch.float64)
    total.mean_into(name, wide.numpy())
    if factor != 1:
        wide *= factor
    return wide.to(dtype) if dtype.is_floating_point else wide.round_().to(dtype)
