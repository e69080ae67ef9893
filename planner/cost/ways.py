"""Ways to run a block: which of its products stay whole under tensor parallelism, and what backward runs again.

A model may run equal blocks in different ways. Costs are told by the name of a way; a block that runs as its
layout says bears its own name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner.spec.graph import Graph
from planner.spec.strategy import Recompute, Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run a block."""

    block: str
    whole: frozenset[str] = frozenset()  # operators that could be cut, and are not
    recompute: Recompute | None = None  # none: as the layout says

    @property
    def name(self) -> str:
        """The block's name, and what differs from the layout's."""
        words = [f"recompute {self.recompute}"] if self.recompute else []
        words += [f"whole {', '.join(sorted(self.whole))}"] if self.whole else []
        return "; ".join([self.block, *words])


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """A strategy with every choice made: which layers each virtual stage holds, and how each block runs."""

    strategy: Strategy
    layers: tuple[int, ...]  # of each virtual stage, in the model's order
    ways: tuple[Way, ...]  # of each placement of the graph


def usual_ways(graph: Graph) -> tuple[Way, ...]:
    """Every block as its layout says."""
    return tuple(Way(block=name) for name in graph.blocks)


def in_model_order(graph: Graph, ways: Iterable[Way]) -> tuple[Way, ...]:
    """Each way once, in the order of the graph's blocks."""
    order = {name: place for place, name in enumerate(graph.blocks)}
    return tuple(sorted(dict.fromkeys(ways), key=lambda way: order[way.block]))
