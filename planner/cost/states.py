"""Weights, gradients and optimizer of each pipeline rank, as its software lays them out, by moment of a step.

Megatron keeps 16-bit weights and whole gradients, and shards the fp32 master weights and moments. The executor
keeps fp32 shards (FSDP2) and gathers blocks in the working precision; gradients that are not reduced yet stand
whole in fp32, and those on their way in buffers: of the head while the last layer is in backward. Where nothing
is sharded nor cast, gradients are packed a group at a time and stay so.
"""

from __future__ import annotations

import numpy as np

from planner.cost.blocks import BlockPricer
from planner.cost.data_parallel import packs
from planner.cost.layouts import Bools, Floats, Layouts
from planner.cost.stages import StageCounts
from planner.cost.weights import RankWeights
from planner.units import FP32_BYTES

_MOMENT_BYTES = {"adamw": 8.0, "sgd": 0.0}

Parts = dict[str, Floats]  # [rank, layout] each


def least_state_bytes(pricer: BlockPricer, layouts: Layouts, dense: Floats, experts: Floats) -> Floats:
    """What a rank with so many weights has at the loss at least, [layout]; linear in the weights."""
    nobody = StageCounts(
        blocks=(), counts=np.zeros((1, 0), dtype=np.int64), rank_of=np.zeros(1, dtype=np.int64), pp=1,
        sends=np.zeros(1, dtype=np.bool_), receives=np.zeros(1, dtype=np.bool_),
    )  # fmt: skip
    nothing = np.zeros_like(dense)[None]
    weights = RankWeights(
        blocks={},
        tied={},
        dense=dense[None],
        experts=experts[None],
        parts=nothing,
        copied=nothing,
        copies=np.ones_like(dense),
        largest_block=nothing,
    )
    return np.asarray(RankStates(pricer, layouts, nobody, weights).least()[0])


class RankStates:
    """The states of pipeline ranks under layouts that share their stages."""

    def __init__(self, pricer: BlockPricer, layouts: Layouts, stages: StageCounts, weights: RankWeights) -> None:
        self.layouts, self.stages, self.weights = layouts, stages, weights
        self.own = pricer.graph.own
        self.megatron = pricer.workload.stack == "megatron"
        self.width = pricer.width
        self.moments = _MOMENT_BYTES[pricer.workload.optimizer]
        self.layers = [name for name in stages.blocks if pricer.kernels[name].layer]
        self.shard = np.maximum(layouts.dp_shard, 1)
        spread = np.where(layouts.zero > 0, np.maximum(layouts.expert_dp // layouts.dp_replicate, 1), 1)
        self.whole = weights.dense + weights.experts
        self.packed = packs(layouts, pricer.workload, width=pricer.width, experts=bool(weights.experts.any())) & (
            layouts.dp * layouts.cp > 1
        )
        self.sharded = weights.dense / self.shard + weights.experts / spread

    @property
    def with_head(self) -> Bools:
        """Which ranks have what stands after the last layer, [rank, 1]."""
        last = self.stages.blocks[-1]
        return self.stages.holders(last)[:, None]

    def least(self) -> Floats:
        """Weights, gradients and optimizer when all forwards are done, without blocks that come and go."""
        if self.megatron:
            return np.asarray(sum(self._megatron_kept().values()))
        stays = np.where(self._drops, 0.0, self.whole * self._gathered_bytes)
        return np.asarray(sum(self._ours().values()) + stays)

    def at_loss(self) -> Parts:
        """Everything forward is done, the logits are there."""
        if self.megatron:
            return self._megatron()
        ends = self._ends()
        gathered = np.where(self._drops, np.where(self.with_head, ends, self._layer()), self.whole)
        return self._ours() | {"gathered": gathered * self._gathered_bytes}

    def behind_head(self) -> Parts:
        """The head is done: its gradients are copied into what is reduced, and come out as shards."""
        if self.megatron:
            return self._megatron()
        head = np.where(self.with_head, self._ends(), 0.0)
        on_way = (self.width + FP32_BYTES + FP32_BYTES / self.shard) * head
        on_way = np.where(self._late | self._copied, 0.0, on_way)
        on_way = np.where(self._packed_beside, np.where(self._late, 1.0, 2.0) * FP32_BYTES * head, on_way)
        return self._in_backward() | {"buffers": self._head_waits if self.own else on_way}

    def in_backward(self) -> Parts:
        """The first layer in backward, the block after it on its way to be reduced."""
        if self.megatron:
            return self._megatron()
        on_way = np.where(self._late, self.width, FP32_BYTES) * self._before
        on_way = np.where(self._late & self._of_two, 0.0, on_way)
        copied = np.where(self.packed, np.where(self._late, 0.0, 1.0), 2.0) * FP32_BYTES * self._before
        on_way = np.where(self._copied, copied, on_way)
        return self._in_backward() | {"buffers": on_way + self._head_waits}

    def behind_experts(self) -> Parts:
        """The first layer's experts are done: their gradients join those on their way."""
        if self.megatron:
            return self._megatron()
        experts = self._most_experts()
        on_way = FP32_BYTES * self._before + (self.width + FP32_BYTES) * experts
        on_way = np.where(self._late | self._copied, (self.width + FP32_BYTES) * experts, on_way)
        states = self._in_backward()
        freed = np.where(self._drops, experts * self._gathered_bytes, 0.0)
        return states | {"gathered": states["gathered"] - freed, "buffers": np.where(experts > 0, on_way, 0.0)}

    def behind_layer(self) -> Parts:
        """The first layer is done: its own gradients are copied into what is reduced next."""
        if self.megatron:
            return self._megatron()
        layer, experts = self._layer(), self._most_experts()
        ahead = np.where(experts > 0, experts, 0.0 if self.own else self._before)
        on_way = FP32_BYTES * ahead + (self.width + FP32_BYTES) * (layer - experts)
        on_way = np.where(self._late | self._copied, 0.0, on_way)
        packed = FP32_BYTES * np.where(self._late, layer, self._before + 2 * layer)
        return self._in_backward() | {"buffers": np.where(self._packed_beside, packed, on_way) + self._head_waits}

    def _in_backward(self) -> Parts:
        """Weights that are gathered and gradients of earlier microbatches while layers are in backward.

        Weights that stay between microbatches are dropped behind the last one, the head's first. Of two
        microbatches the first has all weights and no gradients yet, the second gradients and weights without
        the head's.
        """
        states, layouts = self._ours(), self.layouts
        head = np.where(self.with_head, self._ends(), 0.0) * self._gathered_bytes
        stays = np.where(layouts.zero == 0, self.whole - self._of_block(0), self.whole)
        stays = np.where(layouts.pp > 1, self.whole, stays) * self._gathered_bytes
        alone = (layouts.microbatches == 1) & (layouts.zero > 0) & (layouts.pp == 1)
        spared = np.where(self._of_two, np.minimum(head, states["gradients"]), np.where(alone, head, 0.0))
        dropped = self._layer() * self._gathered_bytes + np.where(self.own, head, 0.0)  # which stay to the end
        return states | {"gathered": np.where(self._drops, dropped, stays - spared)}

    @property
    def _of_two(self) -> Bools:
        """The second of two microbatches drops weights that the first had kept."""
        layouts = self.layouts
        keeps = (layouts.zero == 1) | (layouts.zero == 2)
        return np.asarray(keeps & (layouts.microbatches == 2) & (layouts.pp == 1))

    @property
    def _before(self) -> Floats:
        """What is reduced before the first layer in backward: the head, or a layer's group."""
        head = self.with_head & (not self.own)
        return np.where(head, self._ends(), self._layer() - self._most_experts())

    @property
    def _head_waits(self) -> Floats:
        """Gradients of a user's head: one group with the table's, reduced when these are there too."""
        return self._of_block(-1) * self.width * (self.own and self.stages.blocks[-1] not in self.layers)

    @property
    def _copied(self) -> Bools:
        """Every rank has all gradients, and they are reduced while backward runs."""
        return np.asarray((self.layouts.zero == 0) & (self.layouts.pp == 1))

    @property
    def _packed_beside(self) -> Bools:
        """Gradients are packed as backward makes them; in a pipeline after it."""
        return np.asarray(self.packed & (self.layouts.pp == 1))

    def at_end(self) -> Parts:
        """All backward is done, the first block's gradients are on their way; of a user's module both ends'."""
        if self.megatron:
            return self._megatron()
        reduced = self._ends() if self.own else self._of_block(0)
        packed = np.where(self.layouts.pp > 1, self.weights.largest_block, reduced)
        copied = np.where(self.packed, packed, 2 * reduced) * FP32_BYTES
        on_way = self._sharded_ends() if self.own else 0.0
        first = np.where(self.layouts.zero == 0, copied, on_way)
        whole = np.where(self.layouts.zero == 0, self.whole * FP32_BYTES, 0.0)
        states = self._ours()
        return states | {"gradients": np.maximum(states["gradients"], whole), "buffers": first}

    def _sharded_ends(self) -> Floats:
        """Gradients of a user's ends copied into what is reduced, and weights that stay for another microbatch.

        Where they are added up first, the end of a microbatch that is not the last has more.
        """
        stays = np.where((self.layouts.microbatches > 1) & ~self._drops, self.whole * self._gathered_bytes, 0.0)
        return stays + (self.width + np.where(self._late, 0.0, FP32_BYTES)) * self._ends()

    def _megatron(self) -> Parts:
        gathered = np.where(self.layouts.zero == 3, 2 * self._largest_sharded() * self.width, 0.0)
        return self._megatron_kept() | {"gathered": gathered}

    def _megatron_kept(self) -> Parts:
        zero = self.layouts.zero
        master = FP32_BYTES if self.width < FP32_BYTES else 0.0
        gradients = np.where(zero >= 2, self.sharded, self.whole)
        return {
            "weights": np.where(zero == 3, self.sharded, self.whole) * self.width,
            "gradients": gradients * self.layouts.gradient_bytes,
            "optimizer": self.sharded * (master + self.moments),
        }

    def _ours(self) -> Parts:
        """Shards in fp32, and gradients of earlier microbatches: shards, or whole where nothing was reduced."""
        several = self.layouts.microbatches > 1
        gradients = np.where(self._late, self.whole, np.where(several, self.sharded, 0.0))
        return {
            "weights": self.sharded * FP32_BYTES,
            "gradients": gradients * FP32_BYTES,
            "optimizer": self.sharded * self.moments,
        }

    def _largest_sharded(self) -> Floats:
        """The most of any block that is gathered: an expert that lies on one rank alone is not."""
        layouts = self.layouts
        sizes = [
            weights.dense * (layouts.dp_shard > 1) + weights.experts * (layouts.expert_dp > 1)
            for weights in self.weights.blocks.values()
        ]
        return self.stages.most(np.stack(sizes))

    @property
    def _late(self) -> Bools:
        """Gradients are reduced once, after the last microbatch, and there were others before it."""
        layouts = self.layouts
        once = (layouts.zero <= 1) | (layouts.pp > 1)
        return np.asarray(once & (layouts.microbatches > 1))

    @property
    def _drops(self) -> Bools:
        """Gathered weights are dropped after each block."""
        return np.asarray((self.layouts.zero == 3) & (self.layouts.pp == 1))

    @property
    def _gathered_bytes(self) -> Floats:
        """Of a gathered weight: none where fp32 shards are the weights themselves."""
        layouts = self.layouts
        same = (self.width == FP32_BYTES) & (layouts.dp_shard <= 1)
        return np.where(same, 0.0, self.width)

    def _layer(self) -> Floats:
        """The largest layer of each rank."""
        blocks = self.weights.blocks.values()
        sizes = np.stack([weights.dense + weights.experts for weights in blocks])
        return self.stages.most(sizes, self.layers)

    def _most_experts(self) -> Floats:
        """The most that the experts of a layer of each rank hold."""
        sizes = np.stack([weights.experts for weights in self.weights.blocks.values()])
        return self.stages.most(sizes, self.layers)

    def _of_block(self, place: int) -> Floats:
        """A block's weights on the ranks that have it, [rank, layout]."""
        name = self.stages.blocks[place]
        weights = self.weights.blocks[name]
        held = self.stages.holders(name)[:, None]
        return np.asarray(held * (weights.dense + weights.experts))

    def _ends(self) -> Floats:
        """What stands after the last layer; tied to the embedding, or in a user's module, they are one group."""
        last = self._of_block(len(self.stages.blocks) - 1)
        tied = np.zeros_like(last)
        if self.own:
            first, last = (
                self._of_block(place) * (self.stages.blocks[place] not in self.layers) for place in (0, -1)
            )
            tied = first if len(self.stages.blocks) > 1 else tied
        for shared in self.weights.tied.values():
            tied = np.where(shared > 0, self._of_block(0) - shared, tied)
        return last + tied
