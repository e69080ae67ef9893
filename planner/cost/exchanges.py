"""The collectives that tensor, context and expert parallelism put into one block, before anybody prices them.

They follow from the splits: a whole value that enters a tensor-parallel region is gathered (under sequence
parallelism), a partial sum that leaves one is reduced, and backward mirrors both. The same list tells a plan what
to expect of a step and the cost model what to pay for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from planner.cost.collectives import CollectiveKind
from planner.cost.kernels import Kernels, Sizes
from planner.cost.layouts import Floats, Layouts
from planner.cost.network import GroupAxis
from planner.spec.graph import Block, Operator
from planner.spec.sizes import Tensor
from planner.spec.strategy import Recompute
from planner.spec.workload import Stack
from planner.units import FP32_BYTES

Pass = Literal["forward", "backward", "loss"]

_BOTH: tuple[Recompute, ...] = ("selective", "full")
_STATISTIC_BYTES = FP32_BYTES
# a token's largest logit, then the sum of exponentials and the target's logit: together, or one after the other
_STATISTICS: dict[Stack, tuple[int, ...]] = {
    "eager": (1, 2), "compiled": (1, 2), "cuda_graph": (1, 2), "megatron": (1, 1, 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A collective that a block issues so many times for each microbatch, by layout."""

    axis: GroupAxis
    phase: Pass
    kind: CollectiveKind
    bytes_: Floats  # of one call, as the collective counts them
    calls: Floats
    again: tuple[Recompute, ...] = ()  # under which recomputation backward issues it once more


class BlockExchanges:
    """The exchanges of one block under many layouts."""

    def __init__(self, kernels: Kernels, layouts: Layouts, sizes: Sizes, stack: Stack) -> None:
        self.kernels, self.layouts, self.sizes, self.stack = kernels, layouts, sizes, stack

    def tensor(self) -> Iterator[Exchange]:
        """Of tensor parallelism: all-reduces, or a gather and a scatter each under sequence parallelism."""
        sp = self.layouts.sp.astype(np.float64)
        gathered: set[str] = set()
        for place, operator in enumerate(self.kernels.block.operators):
            split = self.kernels.splits[operator.name]
            if split.hands_over:
                yield from self._entering(operator.outputs[0], place + 1, sp)
            for name in split.gathers:
                if name not in gathered:
                    yield from self._entering(operator.inputs[0], place, sp)
                gathered.add(name)
            if split.output == "partial":
                yield from self._leaving(operator.outputs[0], place + 1, sp)
            if operator.kind == "loss" and split.is_cut:
                statistics = self.sizes.dim(operator.inputs[0].shape[0]) * _STATISTIC_BYTES
                for together in _STATISTICS[self.stack]:
                    yield self._along_tp("loss", "all_reduce", statistics * together, np.ones_like(sp))
        for result in self.kernels.whole_results:
            yield self._along_tp("forward", "all_gather", self.sizes.bytes(result), sp)
        yield from self._around_own_tokens(sp)

    def context(self, attention: Operator) -> Iterator[Exchange]:
        """Keys and values: around a ring (Megatron), their gradients with them; or gathered and scattered."""
        own = self._keys_and_values(attention)
        present = (self.layouts.cp > 1).astype(np.float64)
        if self.stack == "megatron":
            hops = (self.layouts.cp - 1) * present
            yield Exchange(axis="cp_neighbours", phase="forward", kind="p2p", bytes_=own, calls=hops, again=_BOTH)
            yield Exchange(axis="cp_neighbours", phase="backward", kind="p2p", bytes_=own, calls=2 * hops)
            return
        whole = own * self.layouts.cp
        yield Exchange(axis="cp", phase="forward", kind="all_gather", bytes_=whole, calls=present, again=_BOTH)
        yield Exchange(axis="cp", phase="backward", kind="reduce_scatter", bytes_=whole, calls=present)

    def experts(self) -> Iterator[Exchange]:
        """Tokens to their experts and back, forward and backward; gathered where an expert itself is cut."""
        routed = [operator for operator in self.kernels.block.operators if operator.kind == "grouped_matmul"]
        if not routed:
            return
        sent = np.asarray(self.sizes.bytes(routed[0].inputs[0]) / self.layouts.tp)
        spread = (self.layouts.ep > 1).astype(np.float64)
        cut = (self.layouts.etp > 1).astype(np.float64)
        gathered = sent * self.layouts.etp
        whole: tuple[Recompute, ...] = ("full",)
        there = whole if self.stack == "megatron" else _BOTH
        phases: tuple[Pass, ...] = ("forward", "backward")
        for phase in phases:
            forward = phase == "forward"
            yield Exchange(
                axis="ep",
                phase=phase,
                kind="all_to_all",
                bytes_=sent,
                calls=2 * spread,
                again=there if forward else (),
            )
            yield Exchange(
                axis="etp",
                phase=phase,
                kind="all_gather",
                bytes_=gathered,
                calls=cut,
                again=there if forward else (),
            )
            yield Exchange(
                axis="etp", phase=phase, kind="reduce_scatter", bytes_=gathered, calls=cut,
                again=whole if forward else (),
            )  # fmt: skip

    def _entering(self, tensor: Tensor, place: int, sp: Floats) -> Iterator[Exchange]:
        """A whole value that ranks read each for its own features; `place` is the first operator behind."""
        size = self.sizes.bytes(tensor)
        yield self._along_tp("forward", "all_gather", size, sp, again=self._again("all_gather", place))
        yield self._along_tp("backward", "reduce_scatter", size, sp)
        yield self._along_tp("backward", "all_reduce", size, 1.0 - sp)

    def _leaving(self, tensor: Tensor, place: int, sp: Floats) -> Iterator[Exchange]:
        """A sum of which each rank has made a part."""
        size = self.sizes.bytes(tensor)
        yield self._along_tp("forward", "reduce_scatter", size, sp, again=self._again("reduce_scatter", place))
        yield self._along_tp("forward", "all_reduce", size, 1.0 - sp, again=self._again("all_reduce", place))
        yield self._along_tp("backward", "all_gather", size, sp)

    def _around_own_tokens(self, sp: Floats) -> Iterator[Exchange]:
        """Without sequence parallelism ranks share out the tokens for experts, and gather what comes back."""
        own = [place for place, item in enumerate(self.kernels.block.operators) if item.name in self.kernels.own]
        if not own or self.stack == "megatron":
            return
        size = self.sizes.bytes(self.kernels.block.operators[own[-1]].outputs[0])
        again = self._again("all_gather", own[-1] + 1)
        yield self._along_tp("forward", "all_gather", size, 1.0 - sp, again=again)
        yield self._along_tp("backward", "all_gather", size, 1.0 - sp)

    def _along_tp(
        self, phase: Pass, kind: CollectiveKind, size: Floats, calls: Floats, again: tuple[Recompute, ...] = ()
    ) -> Exchange:
        present = calls * (self.layouts.tp > 1)
        return Exchange(axis="tp", phase=phase, kind=kind, bytes_=size, calls=present, again=again)

    def _again(self, kind: CollectiveKind, place: int) -> tuple[Recompute, ...]:
        """Torch's checkpoint stops behind the last value that backward needs; a selective one keeps sums.

        Megatron runs the whole block again, or the attention core.
        """
        if not self.kernels.layer:
            return ()
        if self.stack == "megatron":
            return ("full",)
        if not needed_behind(self.kernels.block, place):
            return ()
        return _BOTH if kind == "all_gather" else ("full",)

    def _keys_and_values(self, attention: Operator) -> Floats:
        """Bytes of both on a rank, whether they are storages of their own or parts of one with the queries."""
        if len(attention.inputs) >= 3:
            return np.asarray(sum(self._held(tensor) for tensor in attention.inputs[1:3]))
        rows, heads, head_dim, value_dim = (
            self.sizes.dim(attention.dims[key]) for key in ("keys", "kv_heads", "head_dim", "value_dim")
        )
        width = self.sizes.width(attention.inputs[0])
        cut = self.layouts.tp if self.kernels.splits[attention.name].is_cut else self.layouts.whole_shards
        whole = self.sizes.dim(attention.dims["batch"]) * rows * heads * (head_dim + value_dim) * width
        return np.asarray(whole / np.minimum(cut, heads))

    def _held(self, tensor: Tensor) -> Floats:
        """Bytes that a rank has of keys or values."""
        cut = self.kernels.shares.get(tensor.name) == "cut"
        size = self.sizes.bytes(tensor) / (self.layouts.tp if cut else self.layouts.whole_shards)
        return np.asarray(size * self.kernels.copies(tensor.name, self.layouts.tp.astype(np.float64)))


def needed_behind(block: Block, place: int) -> bool:
    """Whether any operator from `place` on keeps something for backward."""
    return any(operator.needs_grad and operator.keeps for operator in block.operators[place:])
