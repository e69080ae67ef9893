"""Passes over the borders against every way to cut the layers."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest

from planner.search.borders import Borders
from planner.search.pipelines import Pipelines
from planner.spec.strategy import Strategy
from tests.search.exhaustive import Listing, between, layers_of, listing
from tests.search.instances import Instance, instance
from tests.search.test_ranks import pipelines_of

SEEDS = range(1100, 1124)


@functools.lru_cache(maxsize=1)
def listed(seed: int) -> tuple[Instance, list[Strategy], Listing]:
    """An instance, its pipelines, and every plan of theirs."""
    given = instance(seed, uneven=True)
    some = [strategy for strategy in given.strategies if strategy.pp > 1]
    every = listing(given.graph, given.profile, given.workload, some, given.wishes.allowed_recompute)
    return given, some, every


def cut(seed: int, share: float) -> tuple[Instance, Pipelines, list[Strategy], Listing]:
    """The pipelines of an instance under its usual assignment, with memory for such a share of its plans."""
    given, some, every = listed(seed)
    limited = given.within(between(every.device_bytes, share))
    return limited, pipelines_of(limited, some, 0, limited.limit_bytes), some, every


@pytest.mark.parametrize("seeds", [tuple(SEEDS[first : first + 6]) for first in range(0, len(SEEDS), 6)])
def test_no_pipeline_below_the_limit_is_excluded(seeds: tuple[int, ...]) -> None:
    excluded = 0
    for seed in seeds:
        for share in (0.1, 0.5, 1.0):
            given, pipelines, some, every = cut(seed, share)
            best = np.full(len(some), np.inf)
            fits = every.device_bytes <= given.limit_bytes
            rows = np.array([some.index(strategy) for strategy in every.strategies])
            np.minimum.at(best, rows[fits], every.seconds[fits])
            borders = Borders(pipelines, layers_of(given.graph))
            for place in range(len(some)):
                one = np.array([place])
                if np.isfinite(best[place]):
                    cuts = borders.below(float(best[place]) * (1 + 1e-9), one)
                    assert cuts.found[0], (seed, share, some[place])
                    assert borders.seconds(cuts)[0] >= best[place] * (1 - 1e-9)
                    excluded += int(not borders.below(float(best[place]) * 0.9, one).found[0])
                else:
                    assert not borders.below(np.inf, one).found[0], "nothing fits"
    assert excluded > 0, "a pass that excludes nothing is of no use"


@pytest.mark.parametrize("seed", SEEDS[:6])
def test_chains_are_priced_as_their_stages(seed: int) -> None:
    """What is found has all layers, and its seconds are those of the plan."""
    given, pipelines, some, every = cut(seed, 1.0)
    borders = Borders(pipelines, layers_of(given.graph))
    everyone = np.arange(len(some))
    cuts = borders.below(np.inf, everyone)
    assert cuts.found.all()
    seconds = borders.seconds(cuts)
    for place in random.Random(seed).sample(range(len(some)), min(6, len(some))):
        layers = borders.layers(cuts, place)
        assert (len(layers), sum(layers)) == (some[0].pp, layers_of(given.graph))
        alike = [
            row for row, (held, strategy) in enumerate(zip(every.layers, every.strategies, strict=True))
            if held == layers and strategy == some[place]
        ]  # fmt: skip
        assert seconds[place] == pytest.approx(every.seconds[alike].min(), rel=1e-9)
