"""Which assignments of a model's blocks may stand together."""

from __future__ import annotations

from collections.abc import Mapping

from planner.errors import PlannerError
from planner.search.prices import Choices, products
from planner.spec.assignments import require_equal_ties
from planner.spec.graph import Block, Graph
from planner.spec.regions import MOST_ALTERNATIVES, TooManyAlternativesError, alternatives


def choices_of(graph: Graph, *, cut: bool = True) -> Choices:
    """Every assignment of every block; weights that blocks share are cut alike.

    Uncut, each has the usual one, also where that would cut shared weights unlike one another.
    """
    by_sp = {
        sp: {name: _listed(name, block, sp) if cut else (frozenset(),) for name, block in graph.blocks.items()}
        for sp in (False, True)
    }
    alone = {name: tuple(dict.fromkeys((*by_sp[False][name], *by_sp[True][name]))) for name in graph.blocks}
    together = tuple(found for found in products(alone) if not cut or _ties_hold(graph, found))
    return Choices(
        alone=alone,
        together=together,
        allowed={
            sp: tuple(all(found[name] in by_sp[sp][name] for name in alone) for found in together)
            for sp in (False, True)
        },
    )


def _listed(name: str, block: Block, sequence_parallel: bool) -> tuple[frozenset[str], ...]:
    try:
        return alternatives(block, sequence_parallel=sequence_parallel)
    except TooManyAlternativesError as found:
        raise PlannerError(
            f"a search lists the ways to cut a block over tp, at most {MOST_ALTERNATIVES}",
            value=f"{name}: {found}",
            remedy="set tp to 1, or build the model of smaller blocks that repeat",
            key="fix.tp",
        ) from found


def _ties_hold(graph: Graph, found: Mapping[str, frozenset[str]]) -> bool:
    whole = {place: found[placement.block] for place, placement in enumerate(graph.sequence)}
    try:
        require_equal_ties(graph, whole)
    except PlannerError:
        return False
    return True
