"""Arrangements of tiny models, their plans on a GPU in round numbers, and plans that a person edited."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.cost.stages import even_layers
from planner.cost.ways import Arrangement, Way
from planner.errors import PlannerError
from planner.search.plans import plan_of, re_estimated
from planner.spec.assignments import require_equal_ties
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.orders import SPLIT_BACKWARD
from planner.spec.plan import Plan, content_digest, read_plan
from planner.spec.regions import alternatives
from planner.spec.strategy import Recompute, Strategy
from planner.spec.workload import TrainWorkload
from tests.cost.training_cases import exact, workload
from tests.tiny import tiny_spec

EXACT = exact()
WORDS: tuple[Recompute, ...] = ("none", "selective", "full")


def layers_of(graph: Graph) -> int:
    """How many layers a graph has."""
    return sum(bool(placement.path) for placement in graph.sequence)


def arranged(
    graph: Graph,
    strategy: Mapping[str, Any],
    *,
    layers: tuple[int, ...] | None = None,
    words: Mapping[int, Recompute] | None = None,
    whole: Mapping[int, frozenset[str]] | None = None,
) -> Arrangement:
    """An arrangement: even stages, and every block as the strategy says, but where told otherwise by its place."""
    layout = Strategy.from_dict(dict(strategy))
    held = layers or even_layers(layers_of(graph), layout.pp * layout.vpp)
    ways = tuple(
        Way(
            block=placement.block,
            whole=(whole or {}).get(place, frozenset()),
            recompute=(words or {}).get(place) if placement.path else None,
        )
        for place, placement in enumerate(graph.sequence)
    )
    return Arrangement(strategy=layout, layers=held, ways=ways)


def any_arrangement(draw: random.Random, graph: Graph, strategy: Mapping[str, Any]) -> Arrangement:
    """One with splits, recomputation and stage borders drawn at random."""
    layout = Strategy.from_dict(dict(strategy))
    stages, total = layout.pp * layout.vpp, layers_of(graph)
    borders = sorted(draw.sample(range(1, total), stages - 1)) if stages > 1 else []
    layers = tuple(b - a for a, b in zip([0, *borders], [*borders, total], strict=True))
    every = {name: choices(graph, name, layout.sp) for name in graph.blocks}
    while True:
        whole = {place: draw.choice(every[item.block]) for place, item in enumerate(graph.sequence)}
        try:
            require_equal_ties(graph, whole)
            break
        except PlannerError:
            continue
    again = WORDS[:1] if layout.pp > 1 and layout.schedule in SPLIT_BACKWARD else WORDS
    words = {place: draw.choice(again) for place in range(len(graph.sequence))}
    return arranged(graph, strategy, layers=layers, words=words, whole=whole if layout.tp > 1 else {})


_ALTERNATIVES: dict[tuple[str, str, bool], tuple[frozenset[str], ...]] = {}


def choices(graph: Graph, name: str, sequence_parallel: bool) -> tuple[frozenset[str], ...]:
    """What a block may keep whole."""
    key = graph.digest, name, sequence_parallel
    if key not in _ALTERNATIVES:
        _ALTERNATIVES[key] = alternatives(graph.blocks[name], sequence_parallel=sequence_parallel)
    return _ALTERNATIVES[key]


def planned(
    graph: Graph,
    arrangement: Arrangement,
    work: TrainWorkload | None = None,
    profile: HardwareProfile = EXACT,
    **keys: Any,
) -> Plan:
    """The plan of an arrangement."""
    return plan_of(
        model=graph.name,
        hardware=profile.name,
        graph=graph,
        profile=profile,
        workload=work or workload(),
        arrangement=arrangement,
        command=f"tp-plan plan {graph.name}",
        model_digest=content_digest(graph.name),
        hardware_digest=content_digest(profile),
        **keys,
    )


def edit(plan: Plan, folder: Path, *changes: tuple[str, str]) -> str:
    """The plan's file with some text replaced, each found exactly once."""
    text = plan.to_yaml()
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in\n{text}"
        text = text.replace(old, new)
    path = folder / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def read_again(path: str, graph: Graph, profile: HardwareProfile = EXACT) -> Plan:
    """The plan of a file with the figures of what it says now."""
    plan, source = read_plan(path)
    spec = tiny_spec(graph.name)
    return re_estimated(plan, graph, profile, spec=spec, source=source)
