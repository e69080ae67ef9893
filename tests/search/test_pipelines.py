"""Pipelines of chosen stages against the cost model's price of the same arrangement."""

from __future__ import annotations

import random

import numpy as np
import pytest

from planner.cost.stages import even_layers
from tests.search.exhaustive import layers_of, stage_sizes
from tests.search.instances import instance
from tests.search.test_ranks import alone, prepared, some_pipelines

SEEDS = range(400, 416)


@pytest.mark.parametrize("seeds", [tuple(SEEDS[first : first + 4]) for first in range(0, len(SEEDS), 4)])
def test_a_pipeline_takes_what_its_arrangement_takes(seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        given, draw = instance(seed), random.Random(seed)
        pipelines, some = some_pipelines(given, draw, np.inf)
        sizes = list(stage_sizes(some[0], layers_of(given.graph)))
        for layers in draw.sample(sizes, min(3, len(sizes))):
            prepared(pipelines, layers)
            pipeline = pipelines.priced(layers)
            assert pipeline.layers == layers
            for place in draw.sample(range(len(some)), min(3, len(some))):
                arrangement = pipelines.arrangement(some[place], pipeline, place)
                assert arrangement.layers == layers
                assert len(arrangement.ways) == len(given.graph.sequence)
                exact = alone(given, some[place], layers, arrangement.ways).parts().sum()
                if np.isinf(pipeline.seconds[place]):  # of virtual stages only the best are priced
                    assert pipelines.vpp > 1
                    assert exact >= pipeline.seconds.min() * (1 - 1e-9), (seed, layers)
                else:
                    assert pipeline.seconds[place] == pytest.approx(exact, rel=1e-9, abs=0), (seed, layers)


@pytest.mark.parametrize("seed", SEEDS[:6])
def test_even_pipelines_below_a_limit(seed: int) -> None:
    given = instance(seed)
    pipelines, some = some_pipelines(given, random.Random(seed), np.inf)
    every = pipelines.even()
    assert every.layers == even_layers(layers_of(given.graph), some[0].pp * some[0].vpp)
    assert np.all(np.isfinite(every.seconds))
    middle = float(np.median(every.seconds))
    short = pipelines.even(middle)
    assert np.array_equal(np.isfinite(short.seconds), every.seconds < middle)
    assert np.array_equal(short.seconds[every.seconds < middle], every.seconds[every.seconds < middle])


def test_nothing_fits_in_no_memory() -> None:
    given = instance(SEEDS[0])
    pipelines, _ = some_pipelines(given, random.Random(0), 1.0)
    assert np.all(np.isinf(pipelines.even().seconds))
