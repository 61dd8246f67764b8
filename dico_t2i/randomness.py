"""Random numbers as a function of (seed, purpose, index): there is no generator state to save.

Every random draw (initial noise, timesteps, dropped texts, flips, shuffles) is identified by the run's seed, a purpose
such as ``"noise"`` and the index of its sample. Therefore a batch is the same on 1 or 128 ranks, a sample does not
depend on its neighbours, and a resume needs only the position.

The numbers are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), computed with
integer arithmetic and bit-equal on every device. The key is the seed; the counter is (block of four words, purpose,
index).
"""

import math
import operator
import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_FEW_BLOCKS = 1 << 13  # up to this number, numpy's calls cost less than torch's
_CHUNK = 1 << 13  # blocks of words that are computed together for permutations, so that they stay in a core's cache

Integers = TypeVar("Integers", np.ndarray, Tensor)


def check_seeds(seeds: Sequence[int]) -> list[int]:
    """The seeds of images as Python integers. Raises ValueError if one is not a signed 64-bit integer."""
    found = []
    for seed in seeds:
        try:
            number = operator.index(seed)
        except TypeError:
            raise ValueError(f"seed: {seed!r} is not a whole number") from None
        if not -(1 << 63) <= number < 1 << 63:
            raise ValueError(f"seed: {number} must lie between -2^63 and 2^63 - 1")
        found.append(number)
    return found


def words(seed: int, purpose: str, index: Tensor, count: int) -> Tensor:
    """``count`` random 32-bit words for each index, as int64 in [0, 2^32).

    index: (N,) int64, any device. Returns (N, count) int64 on the same device.
    """
    blocks = -(-count // 4)
    index = index.to(torch.int64)[:, None]
    if index.device.type == "cpu" and blocks * len(index) <= _FEW_BLOCKS:
        counters = (np.arange(blocks)[None, :], index.numpy())
        few = np.stack(_philox(seed, purpose, *counters), axis=-1)
        return torch.from_numpy(few.reshape(len(index), -1)[:, :count])
    block = torch.arange(blocks, device=index.device)[None, :]
    return torch.stack(_philox(seed, purpose, block, index), dim=-1).flatten(1)[:, :count]


def _philox(seed: int, purpose: str, block: Integers, index: Integers) -> tuple[Integers, ...]:
    """The four words, int64, of each block and index, whose shapes are broadcast."""
    zero = 0 * (block + index)
    c0, c1, c2, c3 = (
        zero + block,
        zero + zlib.crc32(purpose.encode()),
        zero + (index & _WORD),
        zero + (index >> 32 & _WORD),
    )
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # The product of two 32-bit words may overflow int64, but its 64 bits are still correct.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def uniform(seed: int, purpose: str, index: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Uniform numbers in [0, 1), float64 with 32 random bits: index (N,) -> (N, *shape)."""
    return (words(seed, purpose, index, math.prod(shape)).double() / 2**32).reshape(-1, *shape)


def normal(seed: int, purpose: str, index: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Standard normal numbers, float32, by Box-Muller in float64: index (N,) -> (N, *shape)."""
    count = math.prod(shape)
    pairs = -(-count // 2)
    u = (words(seed, purpose, index, 2 * pairs).double() + 0.5) / 2**32
    radius, angle = (-2 * u[:, :pairs].log()).sqrt(), 2 * math.pi * u[:, pairs:]
    both = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)
    return both[:, :count].float().reshape(-1, *shape)


def integers(seed: int, purpose: str, index: Tensor, high: int | Tensor) -> Tensor:
    """Uniform integers in [0, high), int64: index (N,) -> (N,). high: below 2^31, common to all or one per index."""
    return (words(seed, purpose, index, 1)[:, 0] * high) >> 32


def permutation(seed: int, purpose: str, index: int, size: int) -> np.ndarray:
    """A permutation of range(size), int64: the sorting order of ``size`` random 62-bit keys (ties by position)."""
    return permutations(seed, purpose, np.array([index]), size)[0]


def permutations(seed: int, purpose: str, indices: np.ndarray, size: int) -> np.ndarray:
    """The ``permutation`` of each index: int64 (n,) -> (n, size). It needs less time than n calls."""
    blocks = -(-size // 2)  # a block of four words makes two keys
    keys = np.empty((len(indices) * blocks, 2), dtype=np.int64)
    for start in range(0, len(keys), _CHUNK):
        row, block = np.divmod(np.arange(start, min(start + _CHUNK, len(keys))), blocks)
        first, second, third, fourth = _philox(seed, purpose, block, indices[row])
        keys[start : start + _CHUNK, 0] = (first << 30) | (second >> 2)
        keys[start : start + _CHUNK, 1] = (third << 30) | (fourth >> 2)
    return np.argsort(keys.reshape(len(indices), 2 * blocks)[:, :size], axis=-1, kind="stable")
