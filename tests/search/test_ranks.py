"""What a rank's cheapest mix takes and needs, against the cost model's price of the whole pipeline."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from planner.cost.activations import BlockActivations
from planner.cost.layouts import Layouts
from planner.cost.training import SharedStages, TrainingCost
from planner.cost.ways import Way
from planner.search.chain import Chain
from planner.search.choices import choices_of
from planner.search.pipelines import Pipelines
from planner.search.prices import block_costs
from planner.search.ranks import RankTable
from planner.spec.strategy import Recompute, Strategy
from tests.search.exhaustive import layers_of, stage_sizes, ways_of, words_of_layers
from tests.search.instances import Instance, instance

SEEDS = range(300, 316)
_NEARLY = 1e-9
_MOST_MIXES = 30


def pipelines_of(given: Instance, some: list[Strategy], together: int, capacity: float) -> Pipelines:
    """A table of strategies that share their stages, under one assignment of the blocks."""
    choices, words = choices_of(given.graph), words_of(given, some[0])
    cost = TrainingCost(given.graph, given.profile, given.workload, choices.ways(given.graph, words))
    layouts = Layouts.of(some, given.workload.global_batch)
    kept = BlockActivations(cost.pricer, layouts)
    return Pipelines(
        RankTable(
            cost, Chain.of(given.graph), layouts, block_costs(cost.pricer, layouts),
            {way.name: kept.of(way.name) for way in cost.pricer.ways},
            choices.together[together], words, capacity,
        )
    )  # fmt: skip


def words_of(given: Instance, strategy: Strategy) -> tuple[Recompute, ...]:
    """What blocks may run again."""
    return given.wishes.recompute_under(strategy.schedule, strategy.pp)


def some_pipelines(given: Instance, draw: random.Random, capacity: float) -> tuple[Pipelines, list[Strategy]]:
    """Those of one draw: all strategies that share its stages, and an assignment that they may have."""
    first = draw.choice([strategy for strategy in given.strategies if strategy.pp > 1] or given.strategies)
    shape = first.pp, first.vpp, first.schedule
    choices = choices_of(given.graph)
    fitting = [place for place, may in enumerate(choices.allowed[first.sp]) if may and first.tp > 1] or [0]
    together = draw.choice(fitting)
    some = [
        other for other in given.strategies
        if (other.pp, other.vpp, other.schedule) == shape
        and (not together or (other.tp > 1 and choices.allowed[other.sp][together]))
    ]  # fmt: skip
    return pipelines_of(given, some, together, capacity), some


def alone(given: Instance, strategy: Strategy, layers: tuple[int, ...], ways: tuple[Way, ...]) -> SharedStages:
    """The cost model's price of one arrangement."""
    return TrainingCost(given.graph, given.profile, given.workload, ways).alone(strategy, layers, ways)


def prepared(pipelines: Pipelines, layers: tuple[int, ...]) -> None:
    """Price the ranks of these stages."""
    ranks = range(pipelines.pp)
    kinds, chunks = ([of(rank, layers) for rank in ranks] for of in (pipelines.kind, pipelines.chunks))
    pipelines.table.price(kinds, chunks)


@pytest.mark.parametrize("seeds", [tuple(SEEDS[first : first + 4]) for first in range(0, len(SEEDS), 4)])
def test_options_take_what_the_cost_model_says(seeds: tuple[int, ...]) -> None:
    """Each virtual stage's forward, backward and gradients of weights; each rank's exchanges and optimizer."""
    for seed in seeds:
        given, draw = instance(seed), random.Random(seed)
        pipelines, some = some_pipelines(given, draw, np.inf)
        for layers in draw.sample(sizes := list(stage_sizes(some[0], layers_of(given.graph))), min(3, len(sizes))):
            prepared(pipelines, layers)
            pipeline = pipelines.priced(layers)
            work = pipelines.work(pipeline.options)
            once = pipelines.table.once_of([pipelines.kind(rank, layers) for rank in range(pipelines.pp)])
            for candidate in draw.sample(range(len(some)), min(3, len(some))):
                arrangement = pipelines.arrangement(some[candidate], pipeline, candidate)
                shared = alone(given, some[candidate], layers, arrangement.ways)
                for name in ("ahead", "back", "weight"):
                    exact = getattr(shared.work, name)[:, 0]
                    assert getattr(work, name)[:, candidate] == pytest.approx(exact, rel=1e-9, abs=1e-18), name
                assert work.hop[candidate] == pytest.approx(shared.work.hop[0], rel=1e-12)
                exchanged: Any = shared.once_a_step()
                for name in ("reduce", "gather", "last", "alone", "optimizer"):
                    exact = getattr(exchanged, name)[:, 0]
                    assert getattr(once, name)[:, candidate] == pytest.approx(exact, rel=1e-9), name


@pytest.mark.parametrize("seeds", [tuple(SEEDS[first : first + 4]) for first in range(0, len(SEEDS), 4)])
def test_a_rank_has_the_cheapest_mix_that_fits(seeds: tuple[int, ...]) -> None:
    """With capacities a billionth above and below what some mix needs: memory is right to that."""
    decided = 0
    for seed in seeds:
        given, draw = instance(seed), random.Random(seed)
        graph = given.graph
        pipelines, some = some_pipelines(given, draw, np.inf)
        words = words_of(given, some[0])
        sizes = list(stage_sizes(some[0], layers_of(graph)))
        if not sizes:
            continue
        layers = draw.choice(sizes)
        whole = {name: ways[0].whole for name, ways in pipelines.table.ways_of.items()}
        candidate = draw.randrange(len(some))
        every = list(words_of_layers(graph, some[0], layers, words))
        mixes = [
            alone(given, some[candidate], layers, ways_of(graph, whole, chosen)) for chosen in every[:_MOST_MIXES]
        ]
        if len(every) > _MOST_MIXES:
            continue
        device = np.stack([mix.memory().device[:, 0] for mix in mixes])  # [mix, rank]
        back = np.stack([mix.stages.rank_sums(mix.work.back)[:, 0] for mix in mixes])
        for rank, near in [(draw.randrange(pipelines.pp), draw.choice((-1, 1))) for _ in range(3)]:
            capacity = float(draw.choice(device[:, rank])) * (1 + near * _NEARLY)
            tight = pipelines_of(given, some, _place(given, whole), capacity)
            prepared(tight, layers)
            option = tight.option(rank, layers)
            fitting = back[device[:, rank] <= capacity, rank]
            assert bool(option.fits[candidate]) == bool(len(fitting)), (seed, rank)
            if len(fitting):
                assert option.back[:, candidate].sum() == pytest.approx(fitting.min(), rel=1e-9), (seed, rank)
                decided += bool(fitting.min() > back[:, rank].min() * (1 + 1e-9))
    assert decided or seeds[0] % 8, "capacity decides sometimes"


def _place(given: Instance, whole: Any) -> int:
    return choices_of(given.graph).together.index(whole)


def test_flights_are_those_of_the_schedule() -> None:
    """One rank of a 1f1b pipeline holds as many microbatches as there are ranks from it to the end."""
    given = instance(1000, uneven=True)
    some = [strategy for strategy in given.strategies if strategy.pp > 1][:1]
    pipelines = pipelines_of(given, some, 0, np.inf)
    held = np.array([moments[0].kept[0, 0] for moments in pipelines.moments])
    count, pp = some[0].microbatches(given.workload.global_batch), some[0].pp
    expected = [count] * pp if some[0].schedule == "gpipe" else [min(count, pp - rank) for rank in range(pp)]
    assert held.tolist() == expected
