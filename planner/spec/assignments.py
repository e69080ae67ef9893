"""From the lines of a plan back to the assignment of a block, and what blocks that share weights must agree on."""

from __future__ import annotations

from collections.abc import Mapping

from planner.errors import PlannerError
from planner.spec.graph import Block, Graph, joined
from planner.spec.paths import lookup
from planner.spec.plan import ModuleSplit
from planner.spec.regions import canonical, mixing_whole, needs_all_tokens
from planner.spec.splits import block_splits, could_be_cut, split_modules


def whole_of_modules(
    block: Block, modules: Mapping[str, ModuleSplit], *, path: str = "", sequence_parallel: bool = False
) -> frozenset[str]:
    """What the lines of a plan, by path pattern, keep whole of the block that stands at `path`.

    Lines that no assignment has are refused: the key names the first module that does not fit the others.
    """
    lines: dict[str, ModuleSplit] = {}
    expected = split_modules(block, block_splits(block), sequence_parallel=sequence_parallel)
    for module in expected:
        full = joined(path, module)
        line = lookup(modules, full)
        if line is None:
            raise PlannerError(
                "with tp the plan says of every module with weights how it is split",
                value=f"nothing about {full}",
                remedy=f"add {full} with {_written(expected[module])}",
                key=f"modules.{full}",
            )
        lines[module] = line
    could = set(could_be_cut(block))
    whole = canonical(
        block,
        frozenset(
            operator.name
            for operator in block.operators
            if operator.name in could and lines[operator.module].split in ("replicate", "sequence")
        ),
    )
    splits = block_splits(block, whole)
    for module, wanted in split_modules(block, splits, sequence_parallel=sequence_parallel).items():
        if lines[module] != wanted:
            full = joined(path, module)
            raise PlannerError(
                "the splits of a block's modules fit together",
                value=f"{full} with {_written(lines[module])}",
                remedy=f"beside its other modules write {_written(wanted)}, or plan again",
                key=f"modules.{full}",
            )
    if sequence_parallel:
        _require_all_tokens(block, whole, path)
    return whole


def _require_all_tokens(block: Block, whole: frozenset[str], path: str) -> None:
    splits, needed = block_splits(block, whole), needs_all_tokens(block)
    for operator in block.operators:
        if operator.name in needed and not splits[operator.name].is_cut:
            full = joined(path, operator.module)
            raise PlannerError(
                "under sequence parallelism what reads all tokens is cut by heads or features",
                value=f"{full}, whole on a part of the sequence",
                remedy="cut the products in front of it by columns, or set sp to false",
                key=f"modules.{full}",
            )


def require_sequence_parallel(graph: Graph) -> None:
    """Refuse parts of a sequence for a model of which something reads all of it and is never cut."""
    mixing = mixing_whole(graph)
    if mixing:
        raise PlannerError(
            "under sequence parallelism what reads all tokens is cut by heads or features",
            value=f"{mixing[0]}, whose products are not modules of their own",
            remedy="set sp to false",
            key="sp",
        )


def tied_operators(graph: Graph) -> tuple[frozenset[tuple[int, str]], ...]:
    """Operators that share weights across blocks, by place in the sequence and name: all whole, or all cut."""
    users: dict[str, set[tuple[int, str]]] = {}
    for place, placement in enumerate(graph.sequence):
        block = graph.blocks[placement.block]
        could = set(could_be_cut(block))
        for operator in block.operators:
            if operator.name in could:
                for path in operator.parameters:
                    users.setdefault(joined(placement.path, path), set()).add((place, operator.name))
    for group in graph.tied:
        together = set[tuple[int, str]]().union(*(users.pop(path, set()) for path in group))
        users[group[0]] = together
    found = [frozenset(items) for items in users.values() if len({place for place, _ in items}) > 1]
    return tuple(dict.fromkeys(found))


def require_equal_ties(graph: Graph, whole: Mapping[int, frozenset[str]]) -> None:
    """Raise where blocks would cut weights that they share and others would keep them whole."""
    for group in tied_operators(graph):
        cut: dict[bool, str] = {}
        for place, name in sorted(group):
            placement = graph.sequence[place]
            block = graph.blocks[placement.block]
            operator = next(item for item in block.operators if item.name == name)
            splits = block_splits(block, whole.get(place, frozenset()))
            cut.setdefault(splits[name].is_cut, joined(placement.path, operator.module))
        if len(cut) > 1:
            raise PlannerError(
                "modules that share a weight cut it alike",
                value=f"{cut[True]} cut, {cut[False]} whole",
                remedy=f"split {cut[False]} as {cut[True]} is split, or keep both whole",
                key=f"modules.{cut[False]}",
            )


def _written(line: ModuleSplit) -> str:
    return f"split: {line.split}, input: {line.input}, output: {line.output}"
