"""The best of all chains against every way to cut the layers."""

from __future__ import annotations

import numpy as np
import pytest

from planner.search import chains
from planner.search.borders import Borders
from planner.search.chains import shortest
from tests.search.exhaustive import layers_of
from tests.search.test_borders import SEEDS, cut


@pytest.mark.parametrize("seed", SEEDS[:8])
def test_the_best_stages_are_found(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for share in (0.2, 1.0):
        given, pipelines, some, every = cut(seed, share)
        borders = Borders(pipelines, layers_of(given.graph))
        best = np.full(len(some), np.inf)
        fits = every.device_bytes <= given.limit_bytes
        rows = np.array([some.index(strategy) for strategy in every.strategies])
        np.minimum.at(best, rows[fits], every.seconds[fits])
        for place, seconds in enumerate(best.tolist()):
            limit = seconds * (1 + 1e-9) if np.isfinite(seconds) else np.inf
            found = shortest(borders, place, limit)
            assert found is not None
            assert found.seconds == pytest.approx(seconds, rel=1e-9)
            assert (found.layers is None) == np.isinf(seconds)
            if found.layers is not None:
                assert sum(found.layers) == layers_of(given.graph)
                none = shortest(borders, place, seconds * (1 - 1e-9))
                assert none is not None
                assert none.layers is None, "nothing is shorter than the best"
    with monkeypatch.context() as patch:
        patch.setattr(chains, "_MOST", 0)
        assert shortest(borders, 0, np.inf) is None, "too many to say anything"
