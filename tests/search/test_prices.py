"""Rows that are alike, against sorting them."""

from __future__ import annotations

import numpy as np
import pytest

from planner.search.prices import alike, distinct


@pytest.mark.parametrize("largest", [3, 1000, 2**40])
@pytest.mark.parametrize("rows", [0, 1, 400])
def test_rows_are_grouped_as_by_sorting(largest: int, rows: int) -> None:
    draw = np.random.default_rng(rows)
    columns = [draw.integers(0, 4, rows), draw.choice([0, 1, largest], rows), draw.integers(0, 3, rows)]
    first, kinds = alike(columns)
    _, expected, places = np.unique(np.stack(columns), axis=1, return_index=True, return_inverse=True)
    assert first.tolist() == expected.tolist()
    assert kinds.tolist() == places.reshape(-1).tolist()


def test_words_come_by_their_first_place() -> None:
    assert distinct(np.array(["b", "a", "b", "c"] * 9000)) == ["b", "a", "c"]
