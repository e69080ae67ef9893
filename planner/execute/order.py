"""In which order a run reads its data: a shuffle of any length that needs no memory.

Place → window is a Feistel network of four rounds over the next power of four, walked until it lands inside
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). It depends on seed and epoch alone, so that
every rank of every layout reads the same.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Places: TypeAlias = Any  # an array of uint64; numpy types the sums of such arrays as Any

_ROUNDS = 4


def windows_at(places: Places, count: int, seed: int) -> Places:
    """The windows of `count` that stand at these places of the run, every epoch in an order of its own."""
    epochs = places // np.uint64(count)
    within = places % np.uint64(count)
    found = np.empty_like(within)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        found[chosen] = shuffled(within[chosen], count, mixed(seed, int(epoch)))
    return found


def shuffled(places: Places, count: int, key: int) -> Places:
    """A permutation of 0 … count−1, at some of its places."""
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    found = places.copy()
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        found[outside] = _enciphered(found[outside], half, key)
        outside = found >= np.uint64(count)
    return found


def mixed(seed: int, number: int) -> int:
    """One seed for each number, far from those of its neighbours."""
    return int(_mix(np.array([seed % 2**64], np.uint64), number)[0])


def _enciphered(values: Places, half: np.uint64, key: int) -> Places:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for turn in range(_ROUNDS):
        left, right = right, left ^ (_mix(right, key + turn) & mask)
    return (left << half) | right


def _mix(values: Places, number: int) -> Places:
    """SplitMix64's finish (Steele, Lea and Flood, 2014), of values offset by a number."""
    with np.errstate(over="ignore"):
        x = values + np.uint64((number + 1) * 0x9E3779B97F4A7C15 % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
