"""Randomness that an adversary cannot guess: AES-256 in counter mode, keyed by the system.

An experiment's seed never reaches this module: two sites with one seed would draw the same
noise, and subtracting their updates would remove it. There is no seed to pass.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedml.errors import ConfigError

FINENESS = 16  # steps of the grid of what is released, to a standard deviation of its noise
_BLOCK = 2**17  # Gaussians drawn at once: what they take stays in the cache
_ZEROS = bytes(2**19)
_LEAST = 2**12  # radii below this, of 2**31, are drawn anew with more bits: far tails need them


class _Pad:
    """Scratch for `half` pairs of Gaussians, made once, for pages and views cost more than sums."""

    def __init__(self, half: int) -> None:
        words = torch.empty(2 * half, dtype=torch.int32)
        self.half, self.first, self.second = half, words[:half], words[half:]
        self.bytes = memoryview(np.asarray(words.numpy()).data).cast("B")
        self.radius, self.angle, self.sine = torch.empty(3, half, dtype=torch.float64)


class SecureNoise:
    """Draws that are fresh for each object, for each call and for each process."""

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16)))
        self._stream = cipher.encryptor()
        self._process = os.getpid()
        self._pad = _Pad(0)

    def normal(self, size: int | Sequence[int], std: float) -> Tensor:
        """Return float64 Gaussian noise of that standard deviation.

        It is not to be released as it is, nor a sum with it: see `hide`.
        """
        shape = (size,) if isinstance(size, int) else tuple(size)
        if not 0 <= std < math.inf:
            raise ConfigError(f"noise of standard deviation {std}: must be 0 or more, and finite")
        values = torch.zeros(math.prod(shape), dtype=torch.float64)
        for _ in self._add(values, std):
            pass
        return values.reshape(shape)

    def hide(self, total: Tensor) -> None:
        """Add Gaussian noise of standard deviation `FINENESS` to `total`, and round to integers.

        `total` [n] is float64 on the CPU, in units of a `FINENESS`th of the noise it is to get.

        Floats are no real numbers: which of them a noised sum can be tells what was summed
        (Mironov 2012). Whole numbers tell nothing, and rounding, like all that follows the
        noise, costs no privacy; it adds 1 / (12 * 16**2), .03 %, to the variance. What is left
        is that a draw takes one of 2**63 points: an integer's odds differ from those of ideal
        noise, in root mean square, by a factor of about 1 + 2**-22. Over k released numbers
        that adds, by strong composition, about 2**-22 * sqrt(2 k ln(1/d)) to epsilon at an
        additional delta d, if all were as bad as they can be: .009 for 2**25 numbers, d = 1e-9.
        """
        for part in self._add(total, FINENESS):
            part.round_()

    def pick(self, size: int, probability: float) -> Tensor:
        """Return some of 0 to `size` - 1, in order, each with `probability`, independently."""
        if not 0 <= probability <= 1:
            raise ConfigError(f"probability {probability}: must lie in [0, 1]")
        whole = math.floor(probability * 2**16)
        words = np.frombuffer(self._bytes(2 * size), np.uint16)
        told = (words <= whole).nonzero()[0]
        open_ = words[told] == whole  # one in 65536: 53 more bits decide
        if open_.any():
            open_[open_] = self._uniform(int(open_.sum())) >= probability * 2**16 - whole
            told = told[~open_]
        return torch.from_numpy(told)

    def discrete_laplace(self, scale: Fraction) -> int:
        """Return an integer n with probability proportional to exp(-|n| / scale), exactly.

        No floats, so no rounding tells the true value (Mironov 2012).
        Source: Canonne, Kamath & Steinke 2020, arXiv:2004.00010, algorithm 2.
        """
        if scale <= 0:
            raise ConfigError(f"scale {scale} of discrete Laplace noise: must be above 0")
        numerator, denominator = scale.numerator, scale.denominator
        while True:
            rest = self.below(numerator)
            if not self._is_exp(Fraction(rest, numerator)):
                continue
            whole = 0
            while self._is_exp(Fraction(1)):
                whole += 1
            size = (rest + numerator * whole) // denominator
            negative = self.below(2) == 1
            if not (negative and size == 0):  # else zero would come twice as often
                return -size if negative else size

    def below(self, end: int) -> int:
        """Return an integer of [0, `end`), each equally likely."""
        bits = (end - 1).bit_length()
        size = -(-bits // 8)
        while True:
            value = int.from_bytes(self._bytes(size)) >> (8 * size - bits)
            if value < end:
                return value

    def _is_exp(self, gamma: Fraction) -> bool:
        """Return true with probability exp(-gamma), for gamma of [0, 1]: algorithm 1."""
        k = 1
        while self.below(gamma.denominator * k) < gamma.numerator:
            k += 1
        return k % 2 == 1

    def _add(self, values: Tensor, std: float) -> Iterator[Tensor]:
        """Add Gaussians, by Box-Muller: 31 bits of radius, in tails 84; 32 of angle.

        Yields block after block, when it is done.
        """
        half = -(-len(values) // max(1, -(-len(values) // _BLOCK)) // 2)
        if self._pad.half != half:
            self._pad = _Pad(half)
        pad, factor = self._pad, 2.0 * std**2
        # of a radius' square, -2 ln(word / 2**31); what is added keeps its root from less than 0
        log = torch.tensor(factor * (31 * math.log(2) + 1e-14), dtype=torch.float64)
        for part in values.split(2 * half) if half else ():
            self._refill(pad.bytes)
            pad.radius.copy_(pad.first.bitwise_and_(2**31 - 1))
            if int(pad.first.min()) < _LEAST:
                far = (pad.first < _LEAST).nonzero().squeeze(1)
                pad.radius[far] += torch.from_numpy(self._uniform(len(far)))
            torch.sub(log, pad.radius.log_(), alpha=factor, out=pad.radius).sqrt_()
            pad.angle.copy_(pad.second).mul_(math.pi * 2.0**-31)
            torch.sin(pad.angle, out=pad.sine)
            pad.angle.cos_()
            if len(part) == 2 * half:
                part[:half].addcmul_(pad.radius, pad.angle)
                part[half:].addcmul_(pad.radius, pad.sine)
            else:
                rest = max(0, len(part) - half)
                part[:half].addcmul_(pad.radius[: len(part)], pad.angle[: len(part)])
                part[half:].addcmul_(pad.radius[:rest], pad.sine[:rest])
            yield part

    def _uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return floats strictly between 0 and 1, of 53 random bits each."""
        words = np.frombuffer(self._bytes(8 * count), np.uint64)
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def _bytes(self, count: int) -> bytearray:
        buffer = bytearray(count)
        self._refill(memoryview(buffer))
        return buffer

    def _refill(self, buffer: memoryview) -> None:
        """Fill `buffer` with random bytes."""
        if os.getpid() != self._process:  # a forked child would repeat its parent's noise
            SecureNoise.__init__(self)
        for start in range(0, len(buffer), len(_ZEROS)):
            part = buffer[start : start + len(_ZEROS)]
            self._stream.update_into(memoryview(_ZEROS)[: len(part)], part)
