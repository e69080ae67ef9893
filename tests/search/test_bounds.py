"""Bounds against the exact step and memory of every plan of random instances."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from planner.cost.stages import ranks_of_stages
from planner.cost.steps import OnceAStep, StageWork, least_seconds, step
from planner.search.bounds import bounds
from planner.search.optimize import Search
from planner.search.prices import LeastPrices
from planner.search.rooms import Rooms
from tests.search.exhaustive import Listing, between
from tests.search.instances import Instance, instance

SEEDS = range(200, 225)


def search_of(given: Instance) -> Search:
    """A search that has not begun."""
    return Search(given.graph, given.profile, given.workload, given.space, given.wishes)


def rows_of(given: Instance, every: Listing) -> Any:
    """Of each plan the row of its strategy in the space."""
    space = given.space
    place = {space.strategy(row): row for row in range(len(space))}
    return np.array([place[strategy] for strategy in every.strategies])


@pytest.mark.parametrize("seeds", [tuple(SEEDS[first : first + 5]) for first in range(0, len(SEEDS), 5)])
def test_bounds_and_rooms_leave_every_plan_that_could_be_the_best(seeds: tuple[int, ...]) -> None:
    closest, excluded = 0.0, 0
    for seed in seeds:
        given = instance(seed)
        every = given.listing
        rows = rows_of(given, every)
        closest = max(closest, closest_bound(given, every, rows))
        excluded += sum(excluded_by_rooms(given, every, rows, share) for share in (0.05, 0.3, 1.0))
    assert closest > 0.7, "bounds that are near nothing prune nothing"
    assert excluded > 0, "rooms that exclude nothing are of no use"


def closest_bound(given: Instance, every: Listing, rows: Any) -> float:
    """No plan is below its bounds; the share of its seconds that the nearest one is bounded by."""
    space, search = given.space, search_of(given)
    prices = LeastPrices(search.cost.pricer, search.choices, space.layouts)
    least = bounds(search.cost.pricer, prices, space.layouts, search.chain.layers)
    assert np.all(np.isfinite(least.step_seconds))
    assert np.all(least.step_seconds[rows] <= every.seconds * (1 + 1e-12))
    assert np.all(least.device_bytes[rows] <= every.device_bytes * (1 + 1e-12))
    return float((least.step_seconds[rows] / every.seconds).max())


def excluded_by_rooms(given: Instance, every: Listing, rows: Any, share: float) -> int:
    """Rooms exclude no candidate that has a step below the limit; how many they do exclude."""
    limited, space = given.within(between(every.device_bytes, share)), given.space
    search = search_of(limited)
    prices = LeastPrices(search.cost.pricer, search.choices, space.layouts)
    best = np.full(len(space), np.inf)
    fits = every.device_bytes <= limited.limit_bytes
    np.minimum.at(best, rows[fits], every.seconds[fits])
    rooms = Rooms(search.cost.pricer, prices, space.layouts, np.arange(len(space)), search.capacity)
    feasible = np.isfinite(best)
    limits = np.where(feasible, best, 1.0) * (1 + 1e-9)
    assert np.all(rooms.below(limits)[feasible]), share
    return int(np.sum(~rooms.below(limits * 0.5)))


@pytest.mark.parametrize("seed", range(6))
def test_least_seconds_are_below_the_step(seed: int) -> None:
    draw = np.random.default_rng(seed)
    shape = random.Random(seed)
    equal = 0
    for schedule, pp, vpp in (
        ("gpipe", 3, 1), ("1f1b", 4, 1), ("1f1b", 2, 1), ("interleaved", 2, 3), ("interleaved", 4, 2),
        ("zb", 2, 2), ("zb", 3, 2), ("zbv", 2, 2), ("zbv", 4, 2),
    ):  # fmt: skip
        count, stages = 40, pp * vpp
        ahead, weight = draw.uniform(0.1, 2.0, (2, stages, count))
        back = weight + draw.uniform(0.1, 2.0, (stages, count))
        work = StageWork(
            ahead=ahead, back=back, weight=weight, hop=draw.uniform(0.0, shape.choice((0.01, 1.0)), count)
        )
        reduce, gather, copies, optimizer = draw.uniform(0.0, 4.0, (4, pp, count))
        once = OnceAStep(
            reduce=reduce, gather=gather, last=draw.uniform(0.0, 1.0, (pp, count)), alone=copies,
            optimizer=optimizer, overlapped=draw.random(count) < 0.7,
        )  # fmt: skip
        keys: Any = {
            "rank_of": ranks_of_stages(pp, vpp, schedule), "pp": pp, "vpp": vpp,
            "microbatches": pp * draw.integers(1, 6, count),
        }  # fmt: skip
        word: Any = schedule
        least, exact = least_seconds(word, work, once, **keys), step(word, work, once, **keys).seconds
        assert np.all(least <= exact * (1 + 1e-12)), schedule
        if vpp == 1:
            assert least == pytest.approx(exact, rel=1e-12)
        equal += int(np.sum(least > 0.9 * exact))
    assert equal > 100
