"""The ways in which tensor parallelism can cut a block: every choice among its regions.

A region is a connected run of cut operators: the products that cut whole values, what follows them, and the
products that sum up at its end. Query, key and value are one region, for attention reads all three; so are gate
and up. What a region cuts does not depend on the rest of the block, so an assignment is a choice of regions that
share no operator, and a block of many products has no more regions than products. Whatever no region of an
assignment holds is whole: the same on every rank or, under sequence parallelism, on its part of the sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from planner.spec.graph import Block, Graph, Operator, joined
from planner.spec.splits import (
    OperatorSplit,
    block_splits,
    could_be_cut,
    own_operators,
    usual_meetings,
    walk,
)

MOST_ALTERNATIVES = 256

# on a part of the sequence these would miss the rest of it
_MIXERS = ("attention", "matmul", "convolution", "reduction", "indexing", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Operators that are cut together or not at all."""

    starts: tuple[str, ...]  # products that cut whole values, vocabulary tables
    products: frozenset[str]  # all of its products and tables
    operators: frozenset[str]  # all that it cuts
    reads: frozenset[str]  # whole storages that its products take in


class TooManyAlternativesError(Exception):
    """A block has too many assignments to list them; an integer program chooses among its regions."""


def regions(block: Block) -> tuple[Region, ...]:
    """Every region of a block, in the order of their first products."""
    names = could_be_cut(block)
    known = usual_meetings(block)
    usually_own = set(own_operators(block, block_splits(block)))
    found: dict[tuple[str, ...], Region] = {}
    for name in names:
        starts = _closed(block, {name}, known)
        if starts is None or starts in found:
            continue
        splits = block_splits(block, frozenset(names) - frozenset(starts))
        if set(own_operators(block, splits)) <= usually_own | set(starts):
            found[starts] = _region(block, starts, splits)
    return tuple(found.values())


def _closed(block: Block, starts: set[str], known: frozenset[tuple[str, str]]) -> tuple[str, ...] | None:
    """The starts of the smallest region with these among them; None where there is none."""
    names = frozenset(could_be_cut(block))
    makers = {tensor.name: operator for operator in block.operators for tensor in operator.outputs}
    while True:
        starts |= _with_equal_weights(block, starts)
        found = walk(block, names - starts)
        if any(found.splits[name].output == "replicate" or found.splits[name].split == "row" for name in starts):
            return None
        met = found.meetings - known
        if not met:
            if found.spoiled & starts:
                return None
            return tuple(operator.name for operator in block.operators if operator.name in starts)
        for _, storage in met:
            further = _made_by(storage, makers, names)
            if not further or further <= starts:
                return None
            starts |= further


def _with_equal_weights(block: Block, names: set[str]) -> set[str]:
    """Operators that use the same parameters."""
    used = {path for operator in block.operators if operator.name in names for path in operator.parameters}
    could = set(could_be_cut(block))
    return {
        operator.name for operator in block.operators if operator.name in could and used & {*operator.parameters}
    }


def _made_by(storage: str, makers: Mapping[str, Operator], products: frozenset[str]) -> set[str]:
    """The nearest products that a whole value comes from."""
    found: set[str] = set()
    waiting, seen = [storage], set[str]()
    while waiting:
        name = waiting.pop()
        maker = makers.get(name)
        if maker is None or name in seen:
            continue
        seen.add(name)
        if maker.name in products:
            found.add(maker.name)
        elif not maker.parameters or maker.kind in ("norm", "elementwise"):  # a norm may be written out
            waiting += [tensor.name for tensor in maker.inputs]
    return found


def _region(block: Block, starts: tuple[str, ...], splits: Mapping[str, OperatorSplit]) -> Region:
    cut = frozenset(name for name, split in splits.items() if split.is_cut and split.split != "expert")
    inside = [operator for operator in block.operators if operator.name in cut]
    return Region(
        starts=starts,
        products=cut & frozenset(could_be_cut(block)),
        operators=cut,
        reads=frozenset(op.inputs[0].name for op in inside if op.name in starts and op.kind == "matmul"),
    )


def whole_but(block: Block, chosen: Sequence[Region]) -> frozenset[str]:
    """The canonical names of what an assignment with these regions keeps whole."""
    cut = frozenset[str]().union(*(region.products for region in chosen))
    return canonical(block, frozenset(could_be_cut(block)) - cut)


def canonical(block: Block, whole: frozenset[str]) -> frozenset[str]:
    """The one name of an assignment: what it keeps whole and the usual one cuts.

    Sets that lead to the same splits have the same one, and the usual assignment has the empty set.
    """
    usual, splits = block_splits(block), block_splits(block, whole)
    names = frozenset(name for name in could_be_cut(block) if not splits[name].is_cut)
    fewer = frozenset(name for name in names if usual[name].is_cut)
    return fewer if block_splits(block, fewer) == splits else names


def alternatives(block: Block, *, sequence_parallel: bool) -> tuple[frozenset[str], ...]:
    """Every assignment of a block that can run, by what it keeps whole; the usual one first.

    Raises `TooManyAlternativesError` where there are more than `MOST_ALTERNATIVES`.
    """
    every = regions(block)
    needed = needs_all_tokens(block) if sequence_parallel else frozenset[str]()
    choices = list(itertools.islice(_choices(every, (), needed), MOST_ALTERNATIVES + 1))
    if len(choices) > MOST_ALTERNATIVES:
        raise TooManyAlternativesError(f"more than {MOST_ALTERNATIVES} assignments of {len(every)} regions")
    order = {name: place for place, name in enumerate(could_be_cut(block))}
    found = {whole_but(block, chosen) for chosen in choices}
    return tuple(sorted(found, key=lambda whole: (len(whole), sorted(order[name] for name in whole))))


def needs_all_tokens(block: Block) -> frozenset[str]:
    """Operators that read every token: cut by heads or features, for a part of the sequence would not do.

    Some of a user's own module cannot be cut so: under sequence parallelism that block cannot run.
    """
    usual = block_splits(block)
    return _never_cut(block, usual) | frozenset(
        operator.name
        for operator in block.operators
        if usual[operator.name].is_cut and usual[operator.name].split != "expert" and _mixes_tokens(operator)
    )


def mixing_whole(graph: Graph) -> tuple[str, ...]:
    """Paths of the modules of attention that is never cut, as torch's own, whose products are no modules."""
    found: dict[str, None] = {}
    for placement in graph.sequence:
        block = graph.blocks[placement.block]
        names = _never_cut(block, block_splits(block))
        modules = (operator.module for operator in block.operators if operator.name in names)
        found |= dict.fromkeys(joined(placement.path, module) for module in modules)
    return tuple(found)


def _never_cut(block: Block, usual: Mapping[str, OperatorSplit]) -> frozenset[str]:
    return frozenset(
        operator.name
        for operator in block.operators
        if operator.kind == "attention" and not usual[operator.name].is_cut
    )


def _mixes_tokens(operator: Operator) -> bool:
    return operator.kind in _MIXERS and not (operator.kind == "matmul" and operator.parameters)


def _choices(
    left: tuple[Region, ...], chosen: tuple[Region, ...], needed: frozenset[str]
) -> Iterator[tuple[Region, ...]]:
    """Regions that share no operator and hold all that is needed, first those that cut the most."""
    if not needed.issubset(frozenset[str]().union(*(region.operators for region in (*chosen, *left)))):
        return
    if not left:
        yield chosen
        return
    first, others = left[0], left[1:]
    if not any(first.operators & region.operators for region in chosen):
        yield from _choices(others, (*chosen, first), needed)
    yield from _choices(others, chosen, needed)
