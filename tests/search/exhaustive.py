"""Every plan of a small instance: strategies by `violations`, arrangements by itertools, priced in full.

Nothing of the search is used. Strategies that share their stages are priced side by side, as the cost model does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.cost.activations import BlockActivations
from planner.cost.layouts import Layouts
from planner.cost.stages import even_layers, ranks_of_stages, stage_counts
from planner.cost.training import SharedStages, TrainingCost
from planner.cost.ways import Arrangement, Way
from planner.errors import PlannerError
from planner.spec.assignments import require_equal_ties
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.legality import violations
from planner.spec.model import ModelSpec
from planner.spec.regions import alternatives
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb", "zbv")
ORDERS = ("tp-cp-dp-pp", "tp-cp-pp-dp")

Floats = NDArray[np.float64]
Assignment = tuple[tuple[str, frozenset[str]], ...]  # what each block keeps whole
Words = tuple[str, ...]  # what each layer runs again, in the model's order


def strategies(
    model: ModelSpec | None,
    workload: TrainWorkload,
    gpus: int,
    fixed: Mapping[str, Any],
    *,
    layers: int,
    schedules: Sequence[str] = SCHEDULES,
) -> tuple[Strategy, ...]:
    """Every legal strategy with these keys fixed, each once."""
    found = dict[Strategy, None]()
    for degrees in _degrees(model, gpus, fixed, layers):
        for keys in _other_keys(model, workload, degrees, fixed, schedules):
            strategy = _written_once(Strategy(**degrees, **keys), fixed)
            if strategy not in found and not violations(model, workload, strategy, gpus):
                found[strategy] = None
    return tuple(found)


def _degrees(
    model: ModelSpec | None, gpus: int, fixed: Mapping[str, Any], layers: int
) -> Iterator[dict[str, int]]:
    own_module = model is None
    for tp, pp, cp in itertools.product(_divisors(gpus), repeat=3):
        dp, rest = divmod(gpus, tp * pp * cp)
        degrees = {"tp": tp, "pp": pp, "cp": cp, "dp": dp}
        if rest or any(fixed.get(key, size) != size for key, size in degrees.items()):
            continue
        if own_module and (tp != fixed.get("tp", 1) or cp != fixed.get("cp", 1)):
            continue
        if own_module and "pp" not in fixed and pp > (layers + 2 if layers else 1):
            continue
        yield degrees


def _other_keys(
    model: ModelSpec | None,
    workload: TrainWorkload,
    degrees: Mapping[str, int],
    fixed: Mapping[str, Any],
    schedules: Sequence[str],
) -> Iterator[dict[str, Any]]:
    tp, pp, cp, dp = (degrees[key] for key in ("tp", "pp", "cp", "dp"))
    routed = model is not None and model.moe is not None
    own = workload.global_batch // dp
    ranges: dict[str, Iterable[Any]] = {
        "ep": _divisors(tp * cp * dp) if routed else (1,),
        "etp": {1, tp} if routed else (1,),
        "schedule": ("1f1b",) if pp == 1 else schedules,
        "vpp": (1,) if pp == 1 else range(1, 9),
        "microbatch": [size for size in _divisors(own) if size <= 8 or size & (size - 1) == 0],
        "zero": range(4),
        "dp_replicate": _divisors(dp),
        "sp": (False, True),
        "order": ORDERS,
    }
    ranges |= {key: (value,) for key, value in fixed.items() if key not in (*degrees, "recompute")}
    for values in itertools.product(*ranges.values()):
        yield dict(zip(ranges, values, strict=True))


def _written_once(strategy: Strategy, fixed: Mapping[str, Any]) -> Strategy:
    """Keys that change nothing at their neutral values."""
    if strategy.tp == 1:
        strategy = replace(strategy, sp=False)
    if strategy.zero == 0 and "dp_replicate" not in fixed:
        strategy = replace(strategy, dp_replicate=1)
    if (strategy.pp == 1 or strategy.dp == 1) and "order" not in fixed:
        strategy = replace(strategy, order=ORDERS[0])
    return strategy


@lru_cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(size for size in range(1, number + 1) if number % size == 0)


def meant(strategy: Strategy, layers: int, fixed: Mapping[str, Any]) -> bool:
    """Whether so many virtual stages are searched: those that divide the layers, embedding and head or not."""
    if "vpp" in fixed or strategy.vpp == 1:
        return True
    stages = strategy.pp * strategy.vpp
    return bool(layers) and 0 in (layers % stages, (layers + 2) % stages)


def assignments(graph: Graph, strategy: Strategy) -> tuple[Assignment, ...]:
    """What the blocks may keep whole together; without tensor parallelism nothing is kept so."""
    return _assignments(_Known(graph), strategy.sp) if strategy.tp > 1 else (_nothing(graph),)


def _nothing(graph: Graph) -> Assignment:
    return tuple((name, frozenset[str]()) for name in graph.blocks)


@dataclass(frozen=True, slots=True)
class _Known:
    """A graph by its identity, for graphs are made once."""

    graph: Graph

    def __hash__(self) -> int:
        return id(self.graph)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and other.graph is self.graph


@lru_cache(maxsize=64)
def _assignments(known: _Known, sequence_parallel: bool) -> tuple[Assignment, ...]:
    graph = known.graph
    each = [alternatives(block, sequence_parallel=sequence_parallel) for block in graph.blocks.values()]
    found = []
    for wholes in itertools.product(*each):
        chosen = dict(zip(graph.blocks, wholes, strict=True))
        placed = {place: chosen[placement.block] for place, placement in enumerate(graph.sequence)}
        try:
            require_equal_ties(graph, placed)
        except PlannerError:
            continue
        found.append(tuple(chosen.items()))
    return tuple(found)


def layers_of(graph: Graph) -> int:
    """How many layers a graph has."""
    return sum(bool(placement.path) for placement in graph.sequence)


def stage_sizes(strategy: Strategy, layers: int) -> Iterator[tuple[int, ...]]:
    """Layers of each virtual stage: spread evenly where a rank has several, else any, but only ends hold none."""
    if strategy.vpp > 1:
        yield even_layers(layers, strategy.pp * strategy.vpp)
        return
    for borders in itertools.combinations_with_replacement(range(layers + 1), strategy.pp - 1):
        ends = (0, *borders, layers)
        sizes = tuple(after - before for before, after in itertools.pairwise(ends))
        if all(sizes[1:-1]):
            yield sizes


def words_of_layers(
    graph: Graph, strategy: Strategy, sizes: Sequence[int], allowed: Sequence[str]
) -> Iterator[Words]:
    """Every mix of every rank; equal layers of a virtual stage are interchangeable."""
    if strategy.pp > 1 and strategy.schedule in ("zb", "zbv"):
        allowed = [word for word in allowed if word == "none"]
    blocks = [placement.block for placement in graph.sequence if placement.path]
    stage_of = [stage for stage, size in enumerate(sizes) for _ in range(size)]
    rank_of = ranks_of_stages(strategy.pp, strategy.vpp, strategy.schedule).tolist()
    groups: dict[tuple[int, str], dict[int, list[int]]] = {}  # rank and block → its layers by virtual stage
    for layer, (block, stage) in enumerate(zip(blocks, stage_of, strict=True)):
        stages = groups.setdefault((rank_of[stage], block), {})
        stages.setdefault(stage, []).append(layer)
    hands = [
        [
            _dealt(chosen, list(stages.values()))
            for chosen in itertools.combinations_with_replacement(allowed, sum(map(len, stages.values())))
        ]
        for stages in groups.values()
    ]
    for dealt in itertools.product(*hands):
        word_of = {layer: word for hand in dealt for layer, word in hand.items()}
        yield tuple(word_of[layer] for layer in range(len(blocks)))


def _dealt(chosen: Sequence[str], stages: list[list[int]]) -> dict[int, str]:
    """Words dealt one by one to virtual stages with room, what runs the most again first."""
    left = [list(layers) for layers in stages]
    word_of: dict[int, str] = {}
    for word in reversed(dict.fromkeys(chosen)):
        turns = itertools.cycle(left)
        for _ in range(chosen.count(word)):
            word_of[next(layers for layers in turns if layers).pop()] = word
    return word_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Everything that may be chosen: a row each of seconds and bytes, with what they belong to."""

    seconds: Floats
    device_bytes: Floats  # of the fullest rank
    strategies: tuple[Strategy, ...]  # of each row
    layers: tuple[tuple[int, ...], ...]
    ways: tuple[tuple[Way, ...], ...]

    def best(self, limit_bytes: float) -> int | None:
        """The row of the shortest step within a limit."""
        fitting = np.flatnonzero(self.device_bytes <= limit_bytes)
        return int(fitting[self.seconds[fitting].argmin()]) if len(fitting) else None

    def arrangement(self, row: int) -> Arrangement:
        """A row with every choice made."""
        return Arrangement(strategy=self.strategies[row], layers=self.layers[row], ways=self.ways[row])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Strategies that share their stages and one assignment of the blocks."""

    strategies: tuple[Strategy, ...]
    assignment: Assignment


def _shape(strategy: Strategy) -> tuple[int, int, str]:
    return strategy.pp, strategy.vpp, strategy.schedule


def _groups(graph: Graph, every: Sequence[Strategy]) -> list[_Group]:
    together: dict[tuple[Any, ...], list[Strategy]] = {}
    for strategy in every:
        for assignment in assignments(graph, strategy):
            together.setdefault((*_shape(strategy), assignment), []).append(strategy)
    return [_Group(strategies=tuple(found), assignment=key[-1]) for key, found in together.items()]


def _arrangements(
    graph: Graph, strategy: Strategy, allowed: Sequence[str]
) -> Iterator[tuple[tuple[int, ...], Words]]:
    for sizes in stage_sizes(strategy, layers_of(graph)):
        for words in words_of_layers(graph, strategy, sizes, allowed):
            yield sizes, words


def ways_of(graph: Graph, whole: Mapping[str, frozenset[str]], words: Words) -> tuple[Way, ...]:
    """The way of each block: what it keeps whole, and the words of layers in the model's order."""
    following = iter(words)
    return tuple(
        Way(
            block=placement.block,
            whole=whole[placement.block],
            recompute=next(following) if placement.path else None,  # type: ignore[arg-type]
        )
        for placement in graph.sequence
    )


def calls(graph: Graph, every: Sequence[Strategy], allowed: Sequence[str], enough: int) -> int:
    """How many arrangements there are to price, counted up to `enough`."""
    total = 0
    for group in _groups(graph, every):
        strategy = group.strategies[0]
        total += sum(1 for _ in itertools.islice(_arrangements(graph, strategy, allowed), enough))
        if total >= enough:
            break
    return total


def listing(
    graph: Graph,
    profile: HardwareProfile,
    workload: TrainWorkload,
    every: Sequence[Strategy],
    allowed: Sequence[str],
) -> Listing:
    """Every arrangement of these strategies, priced by the cost model."""
    groups = _groups(graph, every)
    cost = TrainingCost(graph, profile, workload, _all_ways(graph, groups, allowed))
    seconds, device_bytes = [], []
    rows: list[tuple[Strategy, tuple[int, ...], tuple[Way, ...]]] = []
    for group in groups:
        layouts = Layouts.of(group.strategies, workload.global_batch)
        blocks, kept = cost.pricer.costs(layouts), BlockActivations(cost.pricer, layouts)
        activations = {way.name: kept.of(way.name) for way in cost.pricer.ways}
        first = group.strategies[0]
        for sizes, words in _arrangements(graph, first, allowed):
            ways = ways_of(graph, dict(group.assignment), words)
            stages = stage_counts(graph, first.pp, first.vpp, first.schedule, sizes, ways)
            shared = SharedStages(cost, layouts, stages, blocks, activations)
            seconds.append(shared.parts().sum(axis=0))
            device_bytes.append(shared.memory().device.max(axis=0))
            rows += [(strategy, sizes, ways) for strategy in group.strategies]
    return Listing(
        seconds=np.concatenate([np.empty(0), *seconds]),
        device_bytes=np.concatenate([np.empty(0), *device_bytes]),
        strategies=tuple(row[0] for row in rows),
        layers=tuple(row[1] for row in rows),
        ways=tuple(row[2] for row in rows),
    )


def _all_ways(graph: Graph, groups: Sequence[_Group], allowed: Sequence[str]) -> tuple[Way, ...]:
    layers = {placement.block for placement in graph.sequence if placement.path}
    return tuple(
        dict.fromkeys(
            Way(block=block, whole=whole, recompute=word)  # type: ignore[arg-type]
            for group in groups
            for block, whole in group.assignment
            for word in (allowed if block in layers else (None,))
        )
    )


def between(values: Floats, share: float) -> float:
    """A limit that no value comes near, with about this share of them below it; above all of them at 1."""
    ordered = np.sort(values)
    gaps = np.flatnonzero(np.diff(ordered) > 1e-6 * ordered[:-1])
    if share >= 1.0 or not len(gaps):
        return float(ordered[-1] * 2.0)
    if share <= 0.0:
        return float(ordered[0] * 0.99)
    gap = gaps[np.abs(gaps + 1 - share * len(ordered)).argmin()]
    return math.sqrt(float(ordered[gap]) * float(ordered[gap + 1]))
