"""Mixes of recomputation against every deal of words to layers."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from planner.search.mixes import mixes

CASES = [
    (((3,),), (3,)),
    (((0,),), (2,)),
    (((2, 3),), (3, 3)),
    (((2, 1), (2, 1)), (2, 2)),
    (((3, 0), (1, 2)), (3, 3)),
    (((2, 1, 1), (0, 0, 2)), (2, 1, 2)),
    (((1,), (2,), (2,)), (3,)),
]


@pytest.mark.parametrize(("chunks", "words"), CASES)
def test_every_mix_once(chunks: tuple[tuple[int, ...], ...], words: tuple[int, ...]) -> None:
    """As many of each word as any choice layer by layer has."""
    found = mixes(chunks, words)
    totals = np.array(chunks).sum(axis=0).tolist()
    each = [
        {tuple(Counter(deal)[word] for word in range(own)) for deal in itertools.product(range(own), repeat=total)}
        for total, own in zip(totals, words, strict=True)
    ]
    expected = {tuple(itertools.chain(*deal)) for deal in itertools.product(*each)}
    rows = [tuple(row) for row in found.counts.sum(axis=1).tolist()]
    assert len(rows) == len(set(rows))
    assert set(rows) == expected


@pytest.mark.parametrize(("chunks", "words"), CASES)
def test_each_chunk_holds_its_layers(chunks: tuple[tuple[int, ...], ...], words: tuple[int, ...]) -> None:
    found = mixes(chunks, words)
    starts = [0, *itertools.accumulate(words)]
    for chunk, held in enumerate(chunks):
        for block, layers in enumerate(held):
            own = found.counts[:, chunk, starts[block] : starts[block + 1]]
            assert np.all(own >= 0)
            assert np.all(own.sum(axis=1) == layers)


@pytest.mark.parametrize(("chunks", "words"), CASES)
def test_present_tells_what_a_mix_has_any_of(chunks: tuple[tuple[int, ...], ...], words: tuple[int, ...]) -> None:
    found = mixes(chunks, words)
    assert len(set(found.present)) == len(found.present)
    for counts, presence in zip(found.counts, found.presence, strict=True):
        assert found.present[presence] == tuple((counts.sum(axis=0) > 0).tolist())


def test_the_first_runs_the_least_again() -> None:
    assert mixes(((2, 2),), (3, 3)).counts[0, 0].tolist() == [2, 0, 0, 2, 0, 0]


def test_words_are_spread_over_equal_chunks() -> None:
    """Shares of a word differ by one layer at most, and the earlier chunks have more of the last."""
    counts = mixes(((4,), (4,), (4,)), (2,)).counts
    for row in counts:
        last = row[:, 1].tolist()
        assert max(last) - min(last) <= 1
        assert last == sorted(last, reverse=True)


def test_a_chunk_without_room_passes_its_turn() -> None:
    rows = {tuple(map(tuple, row)) for row in mixes(((1,), (3,)), (2,)).counts.tolist()}
    assert ((0, 1), (1, 2)) in rows
    assert ((0, 1), (2, 1)) in rows
    assert len(rows) == 5
