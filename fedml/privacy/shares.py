"""What sites that share the noise of a sum put into it: whole steps of the noise's own grid.

Each adds noise of `FINENESS` steps' deviation to its own part, and rounds; the steps are the same
at all sites, so the parts add up exactly, and what they add up to is the noised sum, rounded. See
`docs/adr/0018-shares-of-noise.md` for what that proves.
"""

from __future__ import annotations

import torch

from fedml.params import Params
from fedml.privacy.accounting import own_share, training_event, unit_of
from fedml.privacy.noise import FINENESS, SecureNoise
from fedml.protocol.messages import Privacy, Training


def grain_of(training: Training, privacy: Privacy) -> float:
    """Return how far a step of the shared noise's grid moves the sum of deltas times weights.

    0 where sites do not share the noise of their sum.
    """
    if not privacy.shares_noise:
        return 0.0
    share = own_share(training_event(training, privacy, 1), privacy)
    step = privacy.clip * share.noise / FINENESS
    return step if unit_of(privacy.mode) == "site" else -training.lr * step


def hidden(delta: Params, step: float) -> Params:
    """Return a bounded update with a site's share of noise, in whole `step`s, as float64.

    What is no float has no noise, and stays at zero.
    """
    noise, fields = SecureNoise(), delta.layout.fields
    steps = {name: torch.zeros(shape, dtype=torch.float64) for name, _, shape in fields}
    for name, dtype, _ in fields:
        if dtype.is_floating_point:
            flat = steps[name].view(-1)
            flat.copy_(delta[name].reshape(-1)).div_(step)
            noise.hide(flat)
    return Params(steps)
