"""A block as the kernels that run it: splits, fused passes, and what a rank has of each storage.

`Sizes` evaluates a graph's dims and tensors at the microbatch and share of the sequence of many layouts at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from planner.cost.fusion import Pass, passes
from planner.cost.kv_heads import kv_heads
from planner.cost.layouts import Bools, Floats, Layouts, Words
from planner.cost.ways import Way
from planner.spec.graph import Block, Graph
from planner.spec.sizes import Dim, Tensor
from planner.spec.splits import OperatorSplit, block_splits, own_operators
from planner.spec.workload import KvPrecision, Precision, TrainWorkload
from planner.units import bytes_per_element

Share = Literal["whole", "cut", "own", "routed"]  # own: of a rank's own tokens; routed: inside an expert

LOW_PRECISIONS = ("fp8", "fp8_block", "mxfp8", "nvfp4", "mxfp4", "int8", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """A block as the kernels that run it under one software stack, in one way."""

    way: Way
    block: Block
    splits: Mapping[str, OperatorSplit]
    passes: tuple[Pass, ...]
    shares: Mapping[str, Share]  # of each storage: what a rank has of it
    own: frozenset[str]  # operators that work on a rank's own tokens, on their way through experts
    kv_heads: Mapping[str, int]  # heads of keys and values in a storage, or made by a product
    layer: bool  # one of the model's layers, not what stands before, between or after them
    low_precision: frozenset[str]  # products with weights that run in a workload's low precision
    loss: Literal["in place", "in place where cut", "as written"]  # whether gradients overwrite probabilities
    whole_results: tuple[Tensor, ...] = ()  # that code of a user's reads whole, and ranks have parts of

    def recomputed(self, layouts: Layouts) -> Words:
        """What backward runs again of it, by layout."""
        if not self.layer:
            return np.full(len(layouts), "none")
        return layouts.recompute if self.way.recompute is None else np.full(len(layouts), self.way.recompute)

    def loss_in_place(self, layouts: Layouts) -> Bools:
        """Where gradients of the loss overwrite probabilities."""
        cut = layouts.tp > 1 if self.loss == "in place where cut" else self.loss == "in place"
        return np.broadcast_to(cut, layouts.tp.shape)

    def copies(self, name: str, tp: Floats) -> Floats:
        """Ranks that hold the same head of a storage, or make it in a product: several where heads are fewer."""
        heads = self.kv_heads.get(name, 0)
        return np.maximum(tp / heads, 1.0) if heads else np.ones(len(tp))


class Sizes:
    """Dims and tensors of a graph at each layout's microbatch and share of the sequence."""

    def __init__(self, layouts: Layouts, seq_len: int, widths: dict[str, float]) -> None:
        pairs = np.stack([layouts.microbatch, seq_len // layouts.cp])
        (self._b, self._s), self._inverse = np.unique(pairs, axis=1, return_inverse=True)
        self._inverse = self._inverse.reshape(-1)
        self._full = seq_len
        self._widths = widths

    def dim(self, dim: Dim, *, keys: bool = False) -> Floats:
        """A size; `keys` count the whole sequence however it is shared."""
        s = np.full_like(self._s, self._full) if keys else self._s
        return np.broadcast_to(np.asarray(dim.at(self._b, s), dtype=np.float64), self._b.shape)[self._inverse]

    def elements(self, tensor: Tensor) -> Floats:
        """Elements of a tensor; of scores, queries are shared along the sequence and keys are not."""
        long = [place for place, dim in enumerate(tensor.shape) if dim.per_s and not dim.per_b]
        count = np.ones(len(self._b))
        for place, dim in enumerate(tensor.shape):
            s = np.full_like(self._s, self._full) if len(long) > 1 and place == long[-1] else self._s
            count = count * dim.at(self._b, s)
        return np.asarray(count)[self._inverse]

    def bytes(self, tensor: Tensor) -> Floats:
        """Bytes of a tensor."""
        return self.elements(tensor) * self.width(tensor)

    def width(self, tensor: Tensor) -> float:
        """Bytes of an element."""
        return self._widths.get(tensor.dtype, bytes_per_element(tensor.dtype))


def base_precision(precision: Precision) -> KvPrecision:
    """What attention, routers and the head are computed in."""
    return "bf16" if precision in LOW_PRECISIONS else precision  # type: ignore[return-value]


def kernels_of(graph: Graph, workload: TrainWorkload, ways: Iterable[Way]) -> dict[str, Kernels]:
    """Every way as kernels, by its name."""
    layers = {placement.block for placement in graph.sequence if placement.path}
    last = graph.sequence[-1].block
    alike: dict[Way, Kernels] = {}  # ways that differ in what is run again share their kernels
    for way in ways:
        plain = replace(way, recompute=None)
        if plain not in alike:
            made = _kernels(graph.blocks[way.block], workload, plain, layer=way.block in layers, of_user=graph.own)
            read = _read_whole(made.block, made.splits, last=way.block == last) if graph.own else ()
            alike[plain] = replace(made, whole_results=read)
    return {way.name: replace(alike[replace(way, recompute=None)], way=way) for way in ways}


def _kernels(block: Block, workload: TrainWorkload, way: Way, *, layer: bool, of_user: bool) -> Kernels:
    splits = block_splits(block, way.whole)
    shares: dict[str, Share] = {}
    for operator in block.operators:
        split = splits[operator.name]
        share: Share = "cut" if split.output == "features" else "whole"
        inside = any(shares.get(tensor.name) == "routed" for tensor in operator.inputs)
        if operator.kind == "grouped_matmul":
            share = "whole" if inside else "routed"
        elif inside:
            share = "routed"
        shares |= {tensor.name: share for tensor in operator.outputs}
        for tensor in operator.keeps:
            shares.setdefault(tensor.name, "cut" if split.is_cut and operator.kind != "embedding" else share)
    own = frozenset(own_operators(block, splits))
    for operator in block.operators:
        if operator.name in own:
            made = {tensor.name for tensor in (*operator.outputs, *operator.keeps)}
            made -= {tensor.name for tensor in operator.inputs}
            shares |= {name: "own" for name in made if shares[name] == "whole"}
    return Kernels(
        way=way,
        block=block,
        splits=splits,
        passes=passes(block, workload.stack),
        shares=shares,
        own=own,
        kv_heads=kv_heads(block, splits),
        layer=layer,
        low_precision=_low_precision(block) if layer and workload.precision in LOW_PRECISIONS else frozenset(),
        loss=_loss(block, splits, workload, of_user=of_user),
    )


def _loss(
    block: Block, splits: Mapping[str, OperatorSplit], workload: TrainWorkload, *, of_user: bool
) -> Literal["in place", "in place where cut", "as written"]:
    """The executor's loss works in place; a user's module has its own, unless tensor parallelism cuts scores."""
    if not workload.loss_in_place:
        return "as written"
    cut = any(operator.kind == "loss" and splits[operator.name].is_cut for operator in block.operators)
    return "in place" if not of_user else "in place where cut" if cut else "as written"


def _read_whole(block: Block, splits: Mapping[str, OperatorSplit], *, last: bool) -> tuple[Tensor, ...]:
    """What a user's module hands to a loss that is not cut or, without any, to whoever called it."""
    losses = [operator for operator in block.operators if operator.kind == "loss"]
    read = [operator.inputs[0] for operator in losses if not splits[operator.name].is_cut]
    if last and not losses:
        made = {
            item.name: item for operator in block.operators if operator.needs_grad for item in operator.outputs
        }
        read = [made[name] for name in block.outputs if name in made]
    return tuple(tensor for tensor in read if any(dim.per_s or dim.per_bs for dim in tensor.shape))


def _low_precision(block: Block) -> frozenset[str]:
    """Products with weights that tensor parallelism usually cuts; routers and the like stay as they are."""
    usual = block_splits(block)
    with_weights = [operator for operator in block.operators if operator.parameters]
    return frozenset(operator.name for operator in with_weights if usual[operator.name].split != "replicate")
