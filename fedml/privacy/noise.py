"""Randomness that an adversary cannot guess: AES-256 in counter mode, keyed by the system.

An experiment's seed never reaches this module: two sites with one seed would draw the same
noise, and subtracting their updates would remove it. There is no seed to pass.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fedml.errors import ConfigError

_BLOCK = 2**16  # numbers drawn at once: 512 KiB, which stays in the cache
_ZEROS = bytes(8 * _BLOCK)
_SUMMED = 4  # Gaussians in one released Gaussian


class SecureNoise:
    """Draws that are fresh for each object, for each call and for each process."""

    def __init__(self) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16)))
        self._stream = cipher.encryptor()
        self._process = os.getpid()

    def normal(self, size: int | Sequence[int], std: float) -> Tensor:
        """Return float64 Gaussian noise of that standard deviation.

        Each value is a scaled sum of four from Box-Muller, so that the rounding of floats
        does not give a value's history away.
        Source: Holohan & Braghin 2021, arXiv:2107.10138, section 5.
        """
        shape = (size,) if isinstance(size, int) else tuple(size)
        if not 0 <= std < math.inf:
            raise ConfigError(f"noise of standard deviation {std}: must be 0 or more, and finite")
        count = math.prod(shape)
        values = np.zeros(count)
        for start in range(0, count, _BLOCK):
            part = values[start : start + _BLOCK]
            for _ in range(_SUMMED):
                part += self._gaussians(len(part))
        values *= std / math.sqrt(_SUMMED)
        return torch.from_numpy(values).reshape(shape)

    def bernoulli(self, size: int, probability: float) -> Tensor:
        """Return `size` booleans, each true with `probability`, independently."""
        if not 0 <= probability <= 1:
            raise ConfigError(f"probability {probability}: must lie in [0, 1]")
        parts = [
            self._uniform(min(_BLOCK, size - start)) < probability
            for start in range(0, size, _BLOCK)
        ]
        return torch.from_numpy(np.concatenate([np.zeros(0, bool), *parts]))

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

    def _gaussians(self, count: int) -> npt.NDArray[np.float64]:
        half = (count + 1) // 2
        radius = np.sqrt(-2 * np.log(self._uniform(half)))
        angle = 2 * np.pi * self._uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def _uniform(self, count: int) -> npt.NDArray[np.float64]:
        """Return floats strictly between 0 and 1, of 53 random bits each."""
        words = np.frombuffer(self._bytes(8 * count), np.uint64)
        return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def _bytes(self, count: int) -> bytearray:
        if os.getpid() != self._process:  # a forked child would repeat its parent's noise
            SecureNoise.__init__(self)
        buffer = bytearray(count)
        for start in range(0, count, len(_ZEROS)):
            part = memoryview(buffer)[start : start + len(_ZEROS)]
            self._stream.update_into(memoryview(_ZEROS)[: len(part)], part)
        return buffer
