"""Parameters as a rank holds them: cut by tensor and expert parallelism, spread over pipeline stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from planner.cost.kernels import Kernels
from planner.cost.kv_heads import kv_heads
from planner.cost.layouts import Bools, Floats, Layouts
from planner.cost.stages import StageCounts
from planner.cost.ways import Way
from planner.spec.graph import Block, Graph, Operator, Parameter, joined
from planner.spec.splits import OperatorSplit, own_operators

# operators whose weights are cut; others scale or shift what is cut, and read their part of a whole weight
_CUTTING = ("matmul", "embedding", "attention", "grouped_matmul")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Numbers that a rank holds of a block, before data-parallel sharding."""

    dense: Floats  # replicated over data and context parallel ranks
    experts: Floats  # replicated over an expert's own data-parallel ranks
    parts: Floats  # of dense: each tensor-parallel rank makes a part of their gradients
    copied: Floats  # of dense: heads of keys and values, each of whose `copies` makes a part
    copies: Floats  # tensor-parallel ranks that keep the same head


@dataclass(frozen=True, slots=True, kw_only=True)
class RankWeights:
    """Numbers that each pipeline rank holds, `[rank, layout]`; tied ones once on a rank."""

    blocks: Mapping[str, Weights]
    tied: Mapping[str, Floats]  # of a way, what it shares with an earlier one of the rank
    dense: Floats
    experts: Floats
    parts: Floats
    copied: Floats
    copies: Floats  # [layout]
    largest_block: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldParameter:
    """A parameter as ranks hold it before it is spread over data-parallel ranks."""

    path: str
    rows: Floats  # its first dim on a rank
    row_elements: Floats
    columns: Floats  # its second dim, 1 where there is none
    expert: bool
    copies: Floats  # tensor-parallel ranks that keep the same head of keys or values
    parts: Literal["never", "sequence", "always"]  # when each rank's gradient is only a part of the sum

    @property
    def elements(self) -> Floats:
        """Of a rank."""
        return self.rows * self.row_elements

    def in_parts(self, layouts: Layouts) -> Bools:
        """Where each tensor-parallel rank has a part of its gradient."""
        part = layouts.sp if self.parts == "sequence" else np.full(len(layouts), self.parts == "always")
        return np.asarray(part & (layouts.tp > 1))

    def spread(self, ranks: Floats) -> Floats:
        """Elements of all shards together: rows filled up to divide, or columns cut where experts are fewer."""
        padded = np.ceil(self.rows / ranks) * ranks * self.row_elements
        by_column = self.expert & (self.rows % ranks > 0) & (self.columns % ranks == 0)
        return np.asarray(np.where(by_column, self.elements, padded))


def rank_weights(
    kernels: Mapping[str, Kernels],
    tied_groups: Sequence[Sequence[tuple[str, str]]],
    layouts: Layouts,
    stages: StageCounts,
) -> RankWeights:
    """What every pipeline rank holds under layouts that share their stages; ties as `tied_parameters` tells.

    Where a V brings both ends to one rank they are two stages, and each has a table of its own.
    """
    blocks = _weights_of_ways([kernels[name] for name in stages.blocks], layouts)
    listed = [blocks[name] for name in stages.blocks]
    dense, experts, parts, copied = (
        stages.rank_sums(stages.sums(np.stack(numbers)))
        for numbers in zip(*((item.dense, item.experts, item.parts, item.copied) for item in listed), strict=True)
    )
    tied: dict[str, Floats] = {}
    for group in () if "zbv" in layouts.schedule else tied_groups:
        here = np.zeros(stages.pp, dtype=np.bool_)
        for name, path in _named(stages.blocks, kernels, group):
            has = stages.holders(name)
            every = held_parameters(kernels[name].block, kernels[name].splits, layouts)
            shared = next(item for item in every if item.path == path)
            again = np.where((has & here)[:, None], shared.elements, 0.0)
            here |= has
            dense -= again
            parts -= again * shared.in_parts(layouts)
            copied -= again * (shared.copies > 1)
            tied[name] = tied.get(name, 0.0) + again
    largest = stages.most(np.stack([weights.dense + weights.experts for weights in blocks.values()]))
    return RankWeights(
        blocks=blocks,
        tied=tied,
        dense=dense,
        experts=experts,
        parts=parts,
        copied=copied,
        copies=np.stack([item.copies for item in listed]).max(axis=0),
        largest_block=largest,
    )


def _named(
    names: Iterable[str], kernels: Mapping[str, Kernels], group: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """A tied parameter's path in each way of the blocks that share it."""
    paths = dict(group)
    return [(name, paths[kernels[name].way.block]) for name in names if kernels[name].way.block in paths]


def _weights_of_ways(kernels: Iterable[Kernels], layouts: Layouts) -> dict[str, Weights]:
    """Of each way; those that differ in what is run again hold the same."""
    alike: dict[Way, Weights] = {}
    found: dict[str, Weights] = {}
    for item in kernels:
        plain = replace(item.way, recompute=None)
        if plain not in alike:
            alike[plain] = block_weights(item.block, item.splits, layouts)
        found[item.way.name] = alike[plain]
    return found


def block_weights(block: Block, splits: Mapping[str, OperatorSplit], layouts: Layouts) -> Weights:
    """Cut weights are divided by tp, an expert's by ep·etp; the vocabulary is padded to divide."""
    dense, experts, parts, copied = np.zeros((4, len(layouts)))
    copies = np.ones(len(layouts))
    for held in held_parameters(block, splits, layouts):
        if held.expert:
            experts = experts + held.elements
        else:
            dense = dense + held.elements
            parts = parts + held.elements * held.in_parts(layouts)
            copied = copied + held.elements * (held.copies > 1)
            copies = np.maximum(copies, held.copies)
    return Weights(dense=dense, experts=experts, parts=parts, copied=copied, copies=copies)


def held_parameters(
    block: Block, splits: Mapping[str, OperatorSplit], layouts: Layouts
) -> Iterator[HeldParameter]:
    """Every parameter of a block as a rank has it."""
    own, heads = own_operators(block, splits), kv_heads(block, splits)
    users = {path: operator for operator in reversed(block.operators) for path in operator.parameters}
    for parameter in block.parameters:
        operator = users.get(parameter.path)
        split = (
            splits[operator.name] if operator is not None else OperatorSplit(split="replicate", output="replicate")
        )
        cut_dim = _cut_dim(parameter, operator, split)
        yield _held(
            parameter,
            layouts,
            split=split,
            cut_dim=cut_dim,
            kv_heads=heads.get(operator.name, 0) if operator is not None else 0,
            own=operator is not None and operator.name in own,
        )


def _cut_dim(parameter: Parameter, operator: Operator | None, split: OperatorSplit) -> int | None:
    """The dim that tensor parallelism cuts; the bias of a row cut is added once, whole."""
    if operator is None or not split.is_cut or split.split == "expert" or operator.kind not in _CUTTING:
        return None
    if split.split == "row":
        return 1 if len(parameter.shape) > 1 else None
    return 0


def _held(
    parameter: Parameter, layouts: Layouts, *, split: OperatorSplit, cut_dim: int | None, kv_heads: int, own: bool
) -> HeldParameter:
    ones = np.ones(len(layouts))
    rows, shape = parameter.shape[0] * ones if parameter.shape else ones, parameter.shape
    columns = shape[1] * ones if len(shape) > 1 else ones
    row_elements = parameter.elements / rows
    copies = np.maximum(layouts.tp / kv_heads, 1.0) if kv_heads else ones
    if split.split == "expert":
        rows, row_elements = rows / layouts.ep, row_elements / layouts.etp
        columns = np.where(layouts.etp > 1, 1.0, columns)  # not cut once more
    elif cut_dim == 0:
        rows = np.ceil(rows * copies / layouts.tp)
    elif cut_dim == 1:
        row_elements, columns = row_elements / layouts.tp, columns / layouts.tp
    whole = cut_dim is None and split.split != "expert"
    always = own or split.inside or split.split == "heads"
    return HeldParameter(
        path=parameter.path,
        rows=rows,
        row_elements=row_elements,
        columns=columns,
        expert=split.split == "expert",
        copies=copies,
        parts="never" if not whole else "always" if always else "sequence",
    )


def tied_parameters(graph: Graph) -> list[list[tuple[str, str]]]:
    """Parameters that several blocks share: the block and the path in it of each, in the model's order."""
    owners: dict[str, dict[str, str]] = {}  # full path → block → path in it
    for placement in graph.sequence:
        for parameter in graph.blocks[placement.block].parameters:
            owners.setdefault(joined(placement.path, parameter.path), {})[placement.block] = parameter.path
    named = {path for group in graph.tied for path in group}
    groups = [*graph.tied, *((path,) for path in owners if path not in named)]
    shared = [
        list(dict(item for path in group for item in owners.get(path, {}).items()).items()) for group in groups
    ]
    return [blocks for blocks in shared if len(blocks) > 1]
