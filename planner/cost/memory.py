"""Memory of each pipeline rank at its peak: states, activations by schedule position, and what passes through.

The peak is a moment, not a sum of maxima: a rank that holds its most microbatches begins a backward. Exact, from
the graph: weights, gradients, optimizer, kept activations. Estimated: temporaries, buffers, the allocator's
reserve, and what the driver and the communication library take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import cast

import numpy as np

from planner.cost.activations import Activations, BlockActivations
from planner.cost.blocks import BlockPricer
from planner.cost.layouts import Floats, Ints, Layouts
from planner.cost.schedule import Held
from planner.cost.stages import StageCounts
from planner.cost.states import RankStates
from planner.cost.weights import RankWeights
from planner.spec.estimate import Memory
from planner.spec.orders import in_two_parts
from planner.spec.strategy import Schedule
from planner.units import GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCosts:
    """Bytes by part, [rank, layout] each; the parts of `Memory`."""

    parts: dict[str, Floats]

    @property
    def allocated(self) -> Floats:
        """What tensors take, [rank, layout]."""
        return np.asarray(sum(value for key, value in self.parts.items() if key not in _OUTSIDE))

    @property
    def device(self) -> Floats:
        """What the device reports, [rank, layout]."""
        return np.asarray(sum(self.parts.values()))

    def memory(self, rank: int, layout: int) -> Memory:
        """One rank's under one layout."""
        return Memory(**{f"{key}_bytes": float(value[rank, layout]) for key, value in self.parts.items()})


_OUTSIDE = ("reserve", "context")


def rank_memory(
    pricer: BlockPricer,
    layouts: Layouts,
    stages: StageCounts,
    weights: RankWeights,
    activations: Mapping[str, Activations] | None = None,
) -> MemoryCosts:
    """Memory of every pipeline rank under layouts that share their stages; `activations` by way, if known."""
    if activations is None:
        blocks = BlockActivations(pricer, layouts)
        activations = {name: blocks.of(name) for name in stages.blocks}
    return _RankMemory(pricer, layouts, stages, weights, activations).costs()


class _RankMemory:
    def __init__(
        self,
        pricer: BlockPricer,
        layouts: Layouts,
        stages: StageCounts,
        weights: RankWeights,
        activations: Mapping[str, Activations],
    ) -> None:
        self.pricer, self.layouts, self.stages, self.weights = pricer, layouts, stages, weights
        self.activations = activations
        self.schedule = cast("Schedule", str(layouts.schedule[0]))

    def costs(self) -> MemoryCosts:
        parts, elsewhere = self._at_peak()
        allocated = np.sum(list(parts.values()), axis=0)
        memory = self.pricer.profile.memory
        parts["reserve"] = (allocated + elsewhere) * memory.reserved_share + elsewhere
        context = (memory.context_gib + memory.communicator_gib * self._kinds_of_groups()) * GIB
        parts["context"] = np.broadcast_to(context, allocated.shape).astype(np.float64)
        return MemoryCosts(parts=parts)

    def _at_peak(self) -> tuple[dict[str, Floats], Floats]:
        """The moment at which each rank holds most: at the loss, in the backward after it, or at the very end.

        And what the other moments need of parts that are smaller then: their blocks differ in size, so that the
        allocator holds on to both.
        """
        states = RankStates(self.pricer, self.layouts, self.stages, self.weights)
        held, head = self._held(), self.activations[self.stages.blocks[-1]]
        workspace = np.full_like(held, self.pricer.profile.memory.workspace_gib * GIB)
        waiting = head.kept * (len(self.stages.blocks) > 1)  # a single block is the head, and held already
        logits = np.where(states.with_head, waiting + head.passing, 0.0)
        split = in_two_parts(self.schedule, int(self.layouts.pp[0]))
        left = np.where(states.with_head, head.gradients, 0.0) * split  # behind the loss, for a later weight part
        backward = {
            "activations": held, "recompute": self._most("again"), "other": self._most("passing") + workspace
        }  # fmt: skip
        moments = [
            states.at_loss() | {"activations": held - left, "logits": logits, "other": workspace},
            states.behind_head() | {"activations": held, "other": workspace},
            states.in_backward() | backward,
            states.behind_experts() | {"activations": held - self._most("routed"), "other": workspace},
            states.behind_layer() | {"activations": held - self._most("kept"), "other": workspace},
            states.at_end() | {"other": workspace},
        ]
        totals = np.stack([np.sum(list(moment.values()), axis=0) for moment in moments])
        peak = totals.argmax(axis=0)
        nothing = np.zeros_like(held)
        parts, elsewhere = {}, nothing
        for part in ("weights", "gradients", "optimizer", "gathered", "buffers", *backward, "logits"):
            values = [moment.get(part, nothing) for moment in moments]
            parts[part] = np.choose(peak, values)
            elsewhere = elsewhere + np.max(values, axis=0) - parts[part]
        return parts, elsewhere

    def _kinds_of_groups(self) -> Floats:
        """Communicators of a rank: one for all ranks, one along each axis."""
        layouts = self.layouts
        axes = (layouts.tp, layouts.cp, layouts.dp, layouts.pp, layouts.ep)
        along = np.sum([axis > 1 for axis in axes], axis=0)
        return np.asarray(along + (layouts.gpus > 1), dtype=np.float64)

    def _held(self) -> Floats:
        """Activations of the microbatches in flight, without the head's, and what waits for weight parts."""
        sizes = {item.name: self._of_blocks(item.name) for item in fields(Held)}
        sizes["kept"][-1] *= len(self.stages.blocks) == 1
        by_stage = {name: self.stages.sums(of_blocks) for name, of_blocks in sizes.items()}
        result = np.zeros((self.stages.pp, len(self.layouts)))
        for count in np.unique(self.layouts.microbatches):
            rows = self.layouts.microbatches == count
            moments = self.stages.fullest_moments(self.schedule, int(count))
            result[:, rows] = np.max([self._at(held, by_stage)[:, rows] for held in moments], axis=0)
        return result

    def _at(self, held: Held, by_stage: Mapping[str, Floats]) -> Floats:
        """Bytes that ranks hold at a moment, [rank, layout]."""
        result = np.zeros((self.stages.pp, len(self.layouts)))
        for name, sizes in by_stage.items():
            counts: Ints = getattr(held, name)
            for stage, rank in enumerate(self.stages.rank_of):
                result[rank] += sizes[stage] * counts[rank, stage // self.stages.pp]
        return result

    def _of_blocks(self, what: str) -> Floats:
        """[block, layout]."""
        return np.stack([getattr(self.activations[name], what) for name in self.stages.blocks])

    def _most(self, what: str) -> Floats:
        """The most of any layer on a rank, [rank, layout]."""
        return self.stages.most(
            self._of_blocks(what), [name for name in self.stages.blocks if self.pricer.kernels[name].layer]
        )
