"""Site-level privacy: updates are bounded, and their sum made noisy.

The unit is a whole site. Each site clips its own update to a public norm, whatever its rows; a
trusted coordinator adds Gaussian noise to the sum before anybody else sees anything of it, or each
site a share of it before its update is masked. Who takes part is public, and so cannot amplify:
neighbours differ by one site's update, there or zero.
"""

from __future__ import annotations

import torch

from fedml.params import Params
from fedml.privacy.mechanisms import clip
from fedml.privacy.noise import SecureNoise

_PIECE = 2**20  # values at a time
_HAIR = 1e-6  # below the norm that is asked for, so that rounding to float32 does not pass it


def bounded(delta: Params, norm: float) -> Params:
    """Return a site's update with an L2 norm of at most `norm`; what cannot be noised is zero.

    Raises `MalformedUpdate` if the update is not finite.
    """
    clipped = clip(delta, norm * (1 - _HAIR))
    for buffer in clipped.buffers.values():
        if not buffer.dtype.is_floating_point:  # counters: maxima of them have no noise
            buffer.zero_()
    return clipped


def drown(mean: Params, std: float) -> Params:
    """Return `mean` with fresh Gaussian noise of that standard deviation on each float value."""
    noise, buffers = SecureNoise(), dict[torch.dtype, torch.Tensor]()
    for dtype, buffer in mean.buffers.items():
        buffers[dtype] = buffer.clone()
        if not dtype.is_floating_point:
            continue
        for piece in buffers[dtype].split(_PIECE):
            piece += noise.normal(len(piece), std).to(dtype)
    return Params.over(mean.layout, buffers)
