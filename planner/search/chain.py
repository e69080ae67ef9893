"""A model as a chain of layers that stages cut: what any stretch of it holds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from planner.cost.layouts import Ints
from planner.spec.graph import Graph
from planner.spec.strategy import Recompute


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Counts of blocks, in the order of `blocks`."""

    blocks: tuple[str, ...]
    layer: tuple[bool, ...]  # which blocks are layers
    inside: tuple[bool, ...]  # which are layers, or stand between two of them
    before: Ints  # what stands before the first layer: of the first stage
    after: Ints  # what stands after the last layer: of the last stage
    prefix: Ints  # [layer, block]: of all layers before a layer, and what stands between them
    kinds: tuple[int, ...]  # of each layer and what stands before it, by first appearance

    @classmethod
    def of(cls, graph: Graph) -> Chain:
        """The chain of a graph; what stands between two layers goes with the later one."""
        blocks = tuple(graph.blocks)
        layers = {placement.block for placement in graph.sequence if placement.path}
        total = sum(bool(placement.path) for placement in graph.sequence)
        before, after = np.zeros((2, len(blocks)), dtype=np.int64)
        held = np.zeros((total, len(blocks)), dtype=np.int64)
        passed = 0
        for placement in graph.sequence:
            where = blocks.index(placement.block)
            if placement.path:
                held[passed, where] += 1
                passed += 1
            elif passed == 0:
                before[where] += 1
            elif passed == total:
                after[where] += 1
            else:
                held[passed, where] += 1
        known: dict[tuple[int, ...], int] = {}
        return cls(
            kinds=tuple(known.setdefault(tuple(row), len(known)) for row in held.tolist()),
            blocks=blocks,
            layer=tuple(name in layers for name in blocks),
            inside=tuple((held.any(axis=0) | np.isin(blocks, list(layers))).tolist()),
            before=before,
            after=after,
            prefix=np.concatenate([np.zeros((1, len(blocks)), dtype=np.int64), np.cumsum(held, axis=0)]),
        )

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.prefix) - 1

    @property
    def uniform(self) -> bool:
        """Whether any stretch of so many layers holds the same."""
        return len(set(self.kinds)) <= 1

    @property
    def in_runs(self) -> bool:
        """Whether equal layers stand together, so that counts of each kind tell what a stretch holds."""
        return all(kind >= before for before, kind in itertools.pairwise(self.kinds))

    def stretch(self, first: int, end: int) -> tuple[int, ...]:
        """What the layers from `first` on, before `end`, hold."""
        return tuple((self.prefix[end] - self.prefix[first]).tolist())

    def inside_of(self, first: int, end: int) -> tuple[int, ...]:
        """The same without blocks that stand before or after all layers only."""
        held = self.stretch(first, end)
        return tuple(count for count, inside in zip(held, self.inside, strict=True) if inside)

    def reruns(self, first: int, end: int, words: dict[str, list[Recompute]]) -> list[Recompute]:
        """For each layer of a stretch the next word of its block: what backward runs again of it."""
        held = np.diff(self.prefix[first : end + 1], axis=0) * np.array(self.layer)
        kinds = [self.blocks[int(np.argmax(row))] for row in held]
        return [words[kind].pop(0) for kind in kinds]
