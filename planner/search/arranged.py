"""An arrangement as a plan says it, and back: also from a plan that a person edited.

What a file can say in several ways an arrangement says in one (`settled`). Reading a plan checks that it can
run; what cannot is refused with the key and, where the plan came from a file, its line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace

from planner.cost.ways import Arrangement, Way
from planner.errors import PlannerError
from planner.search.misfits import nearest_pattern, spell_out_misfit
from planner.spec.assignments import require_equal_ties, whole_of_modules
from planner.spec.graph import Graph, joined
from planner.spec.legality import require_legal, require_word
from planner.spec.model import ModelSpec
from planner.spec.paths import folded, lookup, unmatched
from planner.spec.plan import ModuleSplit, Plan
from planner.spec.regions import canonical
from planner.spec.splits import block_splits, module_splits, split_modules
from planner.spec.strategy import Recompute, Strategy
from planner.spec.workload import TrainWorkload
from planner.spec.yaml_text import Path, Source

Wholes = dict[int, frozenset[str]]  # what a block keeps whole, by its place in the sequence


def settled(graph: Graph, arrangement: Arrangement) -> Arrangement:
    """The same arrangement as plans have it.

    `strategy.recompute` is the word of all layers, or auto where they differ and each way says its own. Nothing is
    kept whole without tensor parallelism, and what is kept whole goes by its canonical names.
    """
    strategy = arrangement.strategy
    pairs = list(zip(graph.sequence, arrangement.ways, strict=True))
    words = [_word(way.recompute or strategy.recompute) for placement, way in pairs if placement.path]
    alike = len(set(words)) < 2
    whole = {way: _canonical(graph, strategy, way) for way in dict.fromkeys(arrangement.ways)}
    following = iter(words)
    ways = []
    for placement, way in pairs:
        word = next(following) if placement.path else None
        ways.append(Way(block=way.block, whole=whole[way], recompute=None if alike else word))
    everywhere = ("none" if not words else words[0]) if alike else "auto"
    return Arrangement(
        strategy=replace(strategy, recompute=everywhere),
        layers=tuple(map(int, arrangement.layers)),
        ways=tuple(ways),
    )


def _canonical(graph: Graph, strategy: Strategy, way: Way) -> frozenset[str]:
    if strategy.tp == 1 or not way.whole:
        return frozenset()
    return canonical(graph.blocks[way.block], way.whole)


def _word(recompute: str) -> Recompute:
    assert recompute in ("none", "selective", "full"), "an arrangement says of every layer what is run again"
    word: Recompute = recompute  # type: ignore[assignment]
    return word


def module_lines(graph: Graph, arrangement: Arrangement) -> dict[str, ModuleSplit]:
    """The splits of a settled arrangement by path pattern; without tensor parallelism those of spread experts."""
    strategy = arrangement.strategy
    if strategy.tp == strategy.ep == strategy.etp == 1:
        return {}
    whole = {place: way.whole for place, way in enumerate(arrangement.ways) if way.whole}
    table = module_splits(graph, sequence_parallel=_in_sequence(strategy), whole=whole)
    if strategy.tp == 1:
        table = {path: line for path, line in table.items() if line.split == "expert"}
    return folded(table)


def recompute_lines(graph: Graph, arrangement: Arrangement) -> dict[str, Recompute]:
    """What is run again by pattern of blocks, of those alone that run something again."""
    table: dict[str, Recompute] = {}
    for placement, way in zip(graph.sequence, arrangement.ways, strict=True):
        word = _word(way.recompute or arrangement.strategy.recompute) if placement.path else "none"
        if word != "none":
            table[placement.path] = word
    return folded(table)


def arrangement_of(
    plan: Plan, graph: Graph, *, spec: ModelSpec | None = None, source: Source | None = None
) -> Arrangement:
    """The settled arrangement of a plan, be it edited; what cannot run is a PlannerError.

    `spec` is the model's where it has one. `source` is the file that the plan was read from.

    A key of the strategy may be changed alone: where the lines of modules have the layouts of the other `sp`, or
    there are none, they follow the key; so do blocks where `strategy.recompute` alone was changed. Otherwise the
    lines count.
    """
    with _located(plan, source or Source()):
        workload = plan.workload
        if not isinstance(workload, TrainWorkload):
            raise PlannerError(
                "an arrangement is of training",
                value=workload.mode,
                remedy="give a plan of mode: train",
                key="workload.mode",
            )
        _require_legal(plan, workload, spec or plan.model_spec)
        layers = _layers(plan, graph)
        words = _words(plan, graph)
        wholes = _wholes(plan, graph)
    ways = tuple(
        Way(block=placement.block, whole=wholes.get(place, frozenset()), recompute=words.get(place))
        for place, placement in enumerate(graph.sequence)
    )
    return settled(graph, Arrangement(strategy=plan.strategy, layers=layers, ways=ways))


@contextmanager
def _located(plan: Plan, source: Source) -> Iterator[None]:
    """Errors with the key as the file has it, and its line."""
    try:
        yield
    except PlannerError as error:
        path = _file_path(plan, error.key)
        error.key = ".".join(map(str, path))
        error.where = error.where or source.place(path)
        raise


def _file_path(plan: Plan, key: str) -> Path:
    """The path of a key in the file: of a module or block that of the line that speaks for it."""
    table, _, path = key.partition(".")
    if table in ("modules", "recompute") and path:
        patterns: Mapping[str, object] = plan.modules if table == "modules" else plan.recompute
        return table, path if path in patterns else lookup(
            {pattern: pattern for pattern in patterns}, path
        ) or path
    return tuple(int(part) if part.isdigit() else part for part in key.split("."))


def _require_legal(plan: Plan, workload: TrainWorkload, spec: ModelSpec | None) -> None:
    try:
        require_legal(spec, workload, plan.strategy, plan.gpus)
    except PlannerError as error:
        for part, holder in (("strategy", plan.strategy), ("workload", workload)):
            if error.key in {item.name for item in fields(holder)}:
                error.key = f"{part}.{error.key}"
        raise


def _layers(plan: Plan, graph: Graph) -> tuple[int, ...]:
    """Layers of each virtual stage; every one has something to run."""
    total = sum(bool(placement.path) for placement in graph.sequence)
    stages = plan.virtual_stages()
    ended = sum(len(span) for _, _, span in stages)
    if ended != total:
        rank, position, span = next((item for item in reversed(stages) if len(item[2])), stages[-1])
        raise PlannerError(
            f"the stages hold the model's {total} layers, 0 to {total - 1}"
            if total
            else "the model has no layers",
            value=span.to_plain(),
            remedy=f"let the last stage with layers end with {total - 1}" if total else "write none",
            key=f"stages.{rank}.layers.{position}",
        )
    ends = (not graph.sequence[0].path, not graph.sequence[-1].path)
    for place, (rank, position, span) in enumerate(stages):
        holds_an_end = (place == 0 and ends[0]) or (place == len(stages) - 1 and ends[1])
        if not len(span) and not holds_an_end:
            raise PlannerError(
                "a virtual stage holds a layer, or what stands before the first or after the last",
                value=span.to_plain(),
                remedy="give it a layer of its neighbours, or use a smaller pp or vpp",
                key=f"stages.{rank}.layers.{position}",
            )
    return tuple(len(span) for _, _, span in stages)


def _words(plan: Plan, graph: Graph) -> dict[int, Recompute]:
    """What each layer runs again, by its place in the sequence."""
    layers = {place: item.path for place, item in enumerate(graph.sequence) if item.path}
    for pattern in unmatched(plan.recompute, layers.values()):
        raise PlannerError(
            "each line of recompute names a block of the model",
            value=pattern,
            remedy=nearest_pattern(pattern, layers.values()),
            key=f"recompute.{pattern}",
        )
    everywhere = plan.strategy.recompute
    if everywhere != "auto" and _only_the_word_changed(plan, layers):
        return dict.fromkeys(layers, everywhere)
    words = {place: plan.recompute_of(path) for place, path in layers.items()}
    for place, word in words.items():
        require_word(plan.strategy, word, key=f"recompute.{layers[place]}")
    return words


def _only_the_word_changed(plan: Plan, layers: Mapping[int, str]) -> bool:
    """Whether the layout is as it was made but for `strategy.recompute`."""
    words = {plan.recompute_of(path) for path in layers.values()}
    before = replace(plan.strategy, recompute="auto" if len(words) > 1 else words.pop() if words else "none")
    if before == plan.strategy:
        return False
    made = replace(plan, strategy=before, estimate=replace(plan.estimate, strategy=before))
    return not made.edited


def _wholes(plan: Plan, graph: Graph) -> Wholes:
    strategy, lines = plan.strategy, plan.modules
    known = module_splits(graph)
    for pattern in unmatched(lines, known):
        raise PlannerError(
            "each line names a module of the model that has weights or attends",
            value=pattern,
            remedy=nearest_pattern(pattern, known),
            key=f"modules.{pattern}",
        )
    if strategy.tp == 1 or all(line.split == "expert" for line in lines.values()):
        return {}
    cut_along = _in_sequence(strategy)
    try:
        return _of_lines(lines, graph, cut_along)
    except PlannerError:
        try:
            before = _of_lines(lines, graph, not cut_along)
        except PlannerError:
            before = None
        if before is None:
            raise
    return _of_lines(module_splits(graph, sequence_parallel=cut_along, whole=before), graph, cut_along)


def _in_sequence(strategy: Strategy) -> bool:
    return strategy.sp and strategy.tp > 1


def _of_lines(lines: Mapping[str, ModuleSplit], graph: Graph, sequence_parallel: bool) -> Wholes:
    """What every placement keeps whole; blocks with the same lines are read once."""
    names = {
        name: tuple(split_modules(block, block_splits(block), sequence_parallel=sequence_parallel))
        for name, block in graph.blocks.items()
    }
    read: dict[tuple[str, tuple[ModuleSplit | None, ...]], frozenset[str]] = {}
    wholes: Wholes = {}
    for place, placement in enumerate(graph.sequence):
        said = tuple(lookup(lines, joined(placement.path, module)) for module in names[placement.block])
        key = placement.block, said
        if key not in read:
            block = graph.blocks[placement.block]
            try:
                read[key] = whole_of_modules(
                    block, lines, path=placement.path, sequence_parallel=sequence_parallel
                )
            except PlannerError:
                spell_out_misfit(block, lines, placement.path, sequence_parallel=sequence_parallel)
                raise
        wholes[place] = read[key]
    require_equal_ties(graph, wholes)
    return wholes
