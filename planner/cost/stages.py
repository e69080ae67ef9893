"""A model cut into pipeline stages: how many blocks of each kind every virtual stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.cost.layouts import Bools, Floats, Ints
from planner.cost.schedule import Held, fullest_moments
from planner.cost.ways import Way, in_model_order
from planner.spec.graph import Graph
from planner.spec.strategy import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCounts:
    """Blocks of each kind by virtual stage: those of one pipeline in model order, or of ranks to choose from."""

    blocks: tuple[str, ...]  # the names of ways; what stands before the layers comes first, what stands after last
    counts: Ints  # [virtual stage, block]
    rank_of: Ints  # pipeline rank of each virtual stage
    pp: int  # ranks
    sends: Bools  # which virtual stages hand their result to another rank
    receives: Bools  # … and which get theirs from one
    moments: tuple[Held, ...] = ()  # what ranks hold at their fullest; none: as the schedule has it

    @property
    def vpp(self) -> int:
        """Virtual stages of a rank."""
        return len(self.rank_of) // self.pp

    def holds(self, rank: int, block: str) -> bool:
        """Whether a rank has such a block."""
        return bool(self.holders(block)[rank])

    def holders(self, block: str) -> Bools:
        """Which pipeline ranks have such a block."""
        return self._held()[:, self.blocks.index(block)]

    def fullest_moments(self, schedule: Schedule, microbatches: int) -> tuple[Held, ...]:
        """The microbatches that ranks hold at moments of which one is their fullest."""
        return self.moments or fullest_moments(schedule, self.pp, self.vpp, microbatches)

    def most(self, of_blocks: Floats, only: Sequence[str] | None = None) -> Floats:
        """The most of any block that a rank has: [block, layout] → [pipeline rank, layout]."""
        held = self._held()
        if only is not None:
            held = held & np.isin(self.blocks, only)
        return np.asarray(np.where(held[:, :, None], of_blocks, 0.0).max(axis=1, initial=0.0))

    def sums(self, of_blocks: Floats) -> Floats:
        """[block, …] → [virtual stage, …]."""
        return np.asarray(np.tensordot(self.counts, of_blocks, axes=1))

    def rank_sums(self, of_stages: Floats) -> Floats:
        """[virtual stage, …] → [pipeline rank, …]."""
        result = np.zeros((self.pp, *of_stages.shape[1:]))
        np.add.at(result, self.rank_of, of_stages)
        return result

    def _held(self) -> Bools:
        """Which blocks a rank has, [pipeline rank, block]."""
        return self.rank_sums(self.counts.astype(np.float64)) > 0


def stage_counts(
    graph: Graph,
    pp: int,
    vpp: int,
    schedule: str,
    layers: Sequence[int] | None = None,
    ways: Sequence[Way] | None = None,
) -> StageCounts:
    """Blocks by virtual stage; `layers` gives the layers of each, spread evenly where it is left out.

    `ways` gives the way of each placement. What stands before the first layer belongs to the first stage, what
    stands after the last to the last, and what stands between two layers goes with the later one.
    """
    stages = pp * vpp
    placed = [Way(block=placement.block) for placement in graph.sequence] if ways is None else ways
    names = tuple(way.name for way in in_model_order(graph, placed))
    total = sum(bool(placement.path) for placement in graph.sequence)
    held = tuple(layers) if layers is not None else even_layers(total, stages)
    ends = np.cumsum(held)
    counts = np.zeros((stages, len(names)), dtype=np.int64)
    passed = 0
    for placement, way in zip(graph.sequence, placed, strict=True):
        if placement.path:
            stage = int(np.searchsorted(ends, passed, side="right"))
            passed += 1
        elif passed == 0:
            stage = 0
        elif passed == total:
            stage = stages - 1
        else:
            stage = int(np.searchsorted(ends, passed, side="right"))
        counts[min(stage, stages - 1), names.index(way.name)] += 1
    ranks = ranks_of_stages(pp, vpp, schedule)
    away = ranks[1:] != ranks[:-1]
    return StageCounts(
        blocks=names,
        counts=counts,
        rank_of=ranks,
        pp=pp,
        sends=np.append(away, False),
        receives=np.append(False, away),
    )


def ranks_of_stages(pp: int, vpp: int, schedule: str) -> Ints:
    """The pipeline rank of each virtual stage: round and round, in a V for zbv."""
    around = np.arange(pp * vpp) % pp
    back = np.arange(pp * vpp) // pp % 2 == 1
    return np.where(back, pp - 1 - around, around) if schedule == "zbv" else around


@lru_cache(maxsize=4096)
def even_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Layers by virtual stage: equal where they divide, else the embedding and the head count as a layer each.

    What still does not divide gives one layer more to stages in the middle first.
    """
    if layers % stages == 0:
        return (layers // stages,) * stages
    if stages > 1 and (layers + 2) % stages == 0:
        each = (layers + 2) // stages
        return (each - 1, *(each,) * (stages - 2), each - 1)
    each, rest = divmod(layers, stages)
    first = (stages - rest + 1) // 2
    return tuple(each + (first <= stage < first + rest) for stage in range(stages))
