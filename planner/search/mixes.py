"""Mixes of recomputation on a rank: how many layers of each kind run what again, spread over its virtual stages.

Equal layers of a rank are interchangeable. Of several virtual stages each gets its share of every word, the
earlier ones what does not divide, for they hold more microbatches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.cost.layouts import Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixes:
    """Every mix of a rank's layers, those that run the least again first."""

    counts: Ints  # [mix, chunk, block · words]: layers by block and word, the words of a block side by side
    presence: Ints  # [mix]: which of `present` a mix is
    present: tuple[tuple[bool, ...], ...]  # distinct sets of blocks with a word that a mix has any of


@lru_cache(maxsize=4096)
def mixes(chunks: tuple[tuple[int, ...], ...], words: tuple[int, ...]) -> Mixes:
    """Of virtual stages that hold so many layers of each block; as many words to choose from for each."""
    totals = np.array(chunks).sum(axis=0)
    each = itertools.product(*(list(_split(int(total), own)) for total, own in zip(totals, words, strict=True)))
    chosen = np.array([list(itertools.chain(*splits)) for splits in each], dtype=np.int64)
    counts = chosen[:, None] if len(chunks) == 1 else _spread(chosen, np.array(chunks), words)
    present = counts.sum(axis=1) > 0
    distinct, presence = np.unique(present, axis=0, return_inverse=True)
    return Mixes(
        counts=counts,
        presence=presence.reshape(-1),
        present=tuple(tuple(row) for row in distinct.tolist()),
    )


def _split(total: int, words: int) -> Iterator[tuple[int, ...]]:
    """So many layers among words, first all of them under the first word."""
    if words == 1:
        yield (total,)
        return
    for later in range(total + 1):
        for rest in _split(later, words - 1):
            yield (total - later, *rest)


def _spread(chosen: Ints, chunks: Ints, words: Sequence[int]) -> Ints:
    """Of mixes [mix, block · word] the share of each chunk: the last word goes round the chunks first."""
    result = np.zeros((len(chosen), len(chunks), chosen.shape[1]), dtype=np.int64)
    start = 0
    for block, count in enumerate(words):
        room = np.broadcast_to(chunks[:, block], (len(chosen), len(chunks))).copy()
        for word in reversed(range(start, start + count)):
            left = chosen[:, word].copy()
            while left.any():
                for place in range(len(chunks)):
                    given = (left > 0) & (room[:, place] > 0)
                    result[:, place, word] += given
                    room[:, place] -= given
                    left -= given
        start += count
    return result
