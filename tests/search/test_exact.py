"""The planner's answer against everything that it chose from, on random small instances."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from planner.cost.training import TrainingCost
from planner.search import chains, stages
from planner.search.optimize import Found
from planner.search.solvers import Solution, solve
from planner.spec.strategy import Strategy
from tests.search.exhaustive import Listing
from tests.search.instances import Instance, instance, limits

SEEDS = range(162)
EACH = 6  # instances of a test
PIPELINES = tuple(range(1000, 1024))  # seeds whose instances have stages of unequal layers

CHUNKS = tuple(tuple(SEEDS[first : first + EACH]) for first in range(0, len(SEEDS), EACH))


@pytest.mark.parametrize("seeds", CHUNKS, ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_the_plan_is_the_best_of_all(seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        given = instance(seed)
        every = given.listing
        for limit in limits(random.Random(seed), every):
            check(given.within(limit), every, f"seed {seed}")


def check(given: Instance, every: Listing, where: str) -> Found:
    """The search of an instance finds the best of all that fits, or that nothing does."""
    row, found = every.best(given.limit_bytes), given.search()
    certificate = found.certificate
    assert not found.interrupted
    candidates = set(given.strategies)
    assert certificate.pruned + certificate.solved == len(given.space) == len(candidates), where
    if row is None:
        assert found.best == (), where
        return found
    assert found.best, f"{where}: {every.arrangement(row)} fits"
    best = found.best[0]
    assert best.seconds == pytest.approx(every.seconds[row], rel=1e-9, abs=0), f"{where}: {every.arrangement(row)}"
    assert certificate.objective == best.seconds
    assert certificate.bound == pytest.approx(certificate.objective, rel=1e-12, abs=0)
    assert certificate.bound <= certificate.objective
    for other in found.best:
        _is_what_it_says(given, candidates, other, where)
    assert [item.seconds for item in found.best] == sorted(item.seconds for item in found.best)
    return found


def _is_what_it_says(given: Instance, candidates: set[Strategy], solved: Any, where: str) -> None:
    """A solution can be chosen, takes the seconds that it states, and fits."""
    arrangement = solved.arrangement
    assert replace(arrangement.strategy, recompute="none") in candidates, where
    words = {way.recompute for way in arrangement.ways} - {None}
    assert words <= set(given.wishes.allowed_recompute), where
    cost = TrainingCost(given.graph, given.profile, given.workload, arrangement.ways)
    shared = cost.alone(arrangement.strategy, arrangement.layers, arrangement.ways)
    assert shared.parts().sum() == pytest.approx(solved.seconds, rel=1e-9, abs=0), where
    assert shared.memory().device.max() <= given.limit_bytes * (1 + 1e-12), where


@pytest.mark.parametrize("chunk", range(6))
def test_highs_and_cbc_agree(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On instances whose stages are solved as integer programs."""
    asked: Counter[str] = Counter()

    def counted(problem: Any, solver: Any = "highs", **keys: Any) -> Solution:
        asked[solver] += 1
        return solve(problem, solver, **keys)

    monkeypatch.setattr(stages, "solve", counted)
    monkeypatch.setattr(chains, "_MOST", -1)  # none is looked at
    for seed in PIPELINES[chunk::6]:
        given = instance(seed, uneven=True)
        every = given.listing
        for limit in limits(random.Random(seed), every):
            limited = given.within(limit)
            first, second = (
                check(replace_solver(limited, solver), every, f"seed {seed}").certificate
                for solver in ("highs", "cbc")
            )
            assert first.objective == pytest.approx(second.objective, rel=1e-9, abs=0)
            assert (first.solver, second.solver) == ("highs", "cbc")
    assert min(asked["highs"], asked["cbc"]) > 0


def replace_solver(given: Instance, solver: Any) -> Instance:
    """The same, solved by another solver."""
    return replace(given, wishes=replace(given.wishes, solver=solver))


def test_instances_are_of_every_kind() -> None:
    """Models with and without a spec, one to three kinds of layers, tied weights; every schedule and stack."""
    drawn = [instance(seed) for seed in SEEDS[:80]]
    kinds = Counter(
        len({placement.block for placement in given.graph.sequence if placement.path}) for given in drawn
    )
    assert min(kinds[count] for count in (1, 2, 3)) >= 3
    assert any(given.graph.tied for given in drawn)
    assert any(given.model is None for given in drawn)
    assert {given.workload.stack for given in drawn} == {"eager", "compiled", "megatron"}
    schedules = {strategy.schedule for given in drawn for strategy in given.strategies if strategy.pp > 1}
    assert schedules == {"gpipe", "1f1b", "interleaved", "zb", "zbv"}
    keys = Counter(
        key
        for given in drawn
        for key in ("tp", "pp", "cp", "ep", "etp", "zero", "dp_replicate", "sp")
        if len({getattr(strategy, key) for strategy in given.strategies}) > 1
    )
    assert min(keys.values()) > 1
    assert len(keys) == 8


@pytest.mark.parametrize("seeds", list(itertools.pairwise((3, 40, 1001, 1002, 3))))
def test_one_search_never_influences_another(seeds: tuple[int, int]) -> None:
    first, second = (instance(seed, uneven=seed >= 1000) for seed in seeds)
    alone = first.search()
    assert alone.best
    assert first.search() == alone
    other = second.search()
    assert first.search() == alone
    assert second.search() == other
