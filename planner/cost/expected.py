"""The collectives of a steady optimizer step, counted: what a plan lists and a dry run of the executor confirms.

One rank of each pipeline stage; the norm for clipping is the last. Bytes are those of `ExpectedCollective`, summed
over all calls; a message between stages counts where it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.cost.exchanges import BlockExchanges, Exchange
from planner.cost.kernels import Sizes
from planner.cost.network import GroupAxis
from planner.cost.training import SharedStages
from planner.cost.weights import held_parameters
from planner.spec.paths import Span
from planner.spec.plan import CollectiveAxis, CollectiveKind, ExpectedCollective, Phase
from planner.units import FP32_BYTES

_AXES: dict[GroupAxis, CollectiveAxis] = {
    "tp": "tp", "cp": "cp", "cp_neighbours": "cp", "ep": "ep", "etp": "etp", "shard": "dp", "data": "dp",
    "copies": "dp_replicate", "expert_data": "dp",
}  # fmt: skip

_Call = tuple[CollectiveAxis, Phase, CollectiveKind, float, float]  # … calls, bytes of all


def expected_collectives(shared: SharedStages) -> tuple[ExpectedCollective, ...]:
    """What one rank of each pipeline stage issues under the first layout."""
    found: list[ExpectedCollective] = []
    for rank in range(shared.stages.pp):
        sums: dict[tuple[CollectiveAxis, Phase, CollectiveKind], tuple[float, float]] = {}
        for axis, phase, kind, calls, size in _of_rank(shared, rank):
            before = sums.get((axis, phase, kind), (0.0, 0.0))
            sums[axis, phase, kind] = before[0] + calls, before[1] + size
        found += [
            ExpectedCollective(
                stages=Span(rank, rank), axis=axis, phase=phase, kind=kind, count=round(calls), bytes=round(size)
            )
            for (axis, phase, kind), (calls, size) in sums.items()
            if calls
        ]
    return tuple(found)


def _of_rank(shared: SharedStages, rank: int) -> Iterator[_Call]:
    counts = shared.stages.counts[shared.stages.rank_of == rank].sum(axis=0)
    microbatches = float(shared.layouts.microbatches[0])
    for name, count in zip(shared.stages.blocks, counts.tolist(), strict=True):
        for call in _of_block(shared, name):
            axis, phase, kind, calls, size = call
            yield axis, phase, kind, calls * count * microbatches, size * count * microbatches
    yield from _of_parameters(shared, rank, dict(zip(shared.stages.blocks, counts.tolist(), strict=True)))
    yield from _between_stages(shared, rank, microbatches)
    yield from _of_tied_ends(shared, rank)
    if shared.layouts.gpus[0] > 1:
        yield "world", "clip", "all_reduce", 1, FP32_BYTES  # the norm's square


def _between_stages(shared: SharedStages, rank: int, microbatches: float) -> Iterator[_Call]:
    """Results to later stages and gradients to earlier ones, where another rank has them."""
    own = shared.stages.rank_of == rank
    messages = float(shared.stages.sends[own].sum() + shared.stages.receives[own].sum()) * microbatches
    if messages:
        size = float((shared.sent_bytes() / shared.layouts.whole_shards)[0])
        yield "pp", "p2p", "p2p", messages, messages * size


def _of_tied_ends(shared: SharedStages, rank: int) -> Iterator[_Call]:
    """Gradients of a table that the first and the last stage share, where they are different ranks."""
    layouts, stages = shared.layouts, shared.stages
    shards = layouts.dp_shard.astype(np.float64)
    for group in shared.cost.tied:
        held = {}
        for name in stages.blocks:
            kernels = shared.pricer.kernels[name]
            path = dict(group).get(kernels.way.block)
            if path is not None:
                parameters = held_parameters(kernels.block, kernels.splits, layouts)
                held[name] = next(item for item in parameters if item.path == path)
        holders = np.any([stages.holders(name) for name in held], axis=0)
        if holders[rank] and holders.sum() > 1:
            size = next(item for name, item in held.items() if stages.holds(rank, name)).spread(shards)[0]
            yield "pp", "gradient_sync", "all_reduce", 1, float(size / shards[0]) * FP32_BYTES


def _of_block(shared: SharedStages, name: str) -> Iterator[_Call]:
    """What one block issues for one microbatch."""
    layouts, pricer = shared.layouts, shared.pricer
    kernels = pricer.kernels[name]
    sizes = Sizes(layouts, pricer.workload.seq_len, pricer.widths)
    exchanges = BlockExchanges(kernels, layouts, sizes, pricer.workload.stack)
    listed = list(exchanges.tensor())
    for operator in kernels.block.operators:
        if operator.kind == "attention":
            listed += exchanges.context(operator)
    listed += exchanges.experts()
    recompute = str(kernels.recomputed(layouts)[0])
    for exchange in listed:
        if not exchange.calls[0]:
            continue
        yield _call(exchange, exchange.phase)
        if recompute in exchange.again:
            yield _call(exchange, "recompute")


def _call(exchange: Exchange, phase: Phase) -> _Call:
    calls = float(exchange.calls[0])
    return _AXES[exchange.axis], phase, exchange.kind, calls, calls * float(exchange.bytes_[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Parameters that are gathered and reduced together: a block, its experts, or the tied ends of a model."""

    count: float
    elements: float  # of all of them, each padded to divide among its ranks
    ranks: int  # that share them
    copies: int  # of those ranks
    layer: bool


def _tied(shared: SharedStages, rank: int) -> set[tuple[str, str]]:
    """Parameters, by way and path, that a rank has once although several blocks use them: all but the first."""
    return {
        (name, path)
        for name, alike in shared.weights.tied.items()
        for group in shared.cost.tied
        for block, path in group
        if alike[rank].any() and shared.pricer.kernels[name].way.block == block
    }


def _groups(shared: SharedStages, rank: int, counts: dict[str, int]) -> list[_Group]:
    layouts = shared.layouts
    zero = bool(layouts.zero[0])
    copies = int(layouts.dp_replicate[0]) if zero else 1
    dense = int(layouts.dp_shard[0] if zero else layouts.dp[0] * layouts.cp[0])
    routed = int(layouts.expert_dp[0]) // copies
    tied = _tied(shared, rank)
    groups: list[_Group] = []
    ends = 0.0
    for name, count in counts.items():
        kernels = shared.pricer.kernels[name]
        whole = {False: 0.0, True: 0.0}
        for held in held_parameters(kernels.block, kernels.splits, layouts):
            if (name, held.path) not in tied:
                ranks = (routed if held.expert else dense) if zero else 1
                whole[held.expert] += float(held.spread(np.array([ranks]))[0]) * count
        if (tied or shared.cost.graph.own) and not kernels.layer:
            ends += whole[False]
        elif whole[False]:
            groups.append(
                _Group(count=count, elements=whole[False], ranks=dense, copies=copies, layer=kernels.layer)
            )
        if whole[True]:
            groups.append(_Group(count=count, elements=whole[True], ranks=routed, copies=copies, layer=True))
    if ends:
        groups.append(_Group(count=1, elements=ends, ranks=dense, copies=copies, layer=False))
    return groups


def _of_parameters(shared: SharedStages, rank: int, counts: dict[str, int]) -> Iterator[_Call]:
    """Gradients that are reduced and parameters that are gathered, block by block."""
    layouts, pricer = shared.layouts, shared.pricer
    zero, microbatches = int(layouts.zero[0]), float(layouts.microbatches[0])
    pipelined = shared.stages.pp > 1
    gathers = microbatches if zero == 3 and not pipelined else 1.0
    reduces = microbatches if zero >= 2 and not pipelined else 1.0
    for group in _groups(shared, rank, counts):
        values, gradients = group.elements * pricer.width, group.elements * float(layouts.gradient_bytes[0])
        if zero == 0 and group.ranks > 1:
            yield "dp", "gradient_sync", "all_reduce", group.count, gradients
        if zero and group.ranks > 1:
            yield "dp", "forward", "all_gather", gathers * group.count, gathers * values
            if zero == 3 and not pipelined and group.layer:
                yield "dp", "backward", "all_gather", gathers * group.count, gathers * values
            yield "dp", "gradient_sync", "reduce_scatter", reduces * group.count, reduces * gradients
        if zero and group.copies > 1:
            yield "dp_replicate", "gradient_sync", "all_reduce", group.count, gradients / group.ranks
    yield from _of_parts(shared, rank, counts)


def _of_parts(shared: SharedStages, rank: int, counts: dict[str, int]) -> Iterator[_Call]:
    """Gradients of which each tensor-parallel rank has a part: summed once a step, in fp32.

    Of weights used on parts of the sequence, on a rank's own tokens or on its heads among all of the group, of
    copies of a head among those that keep them.
    """
    layouts = shared.layouts
    if layouts.tp[0] == 1:
        return
    ranks = layouts.dp_shard.astype(np.float64)
    everywhere = by_head = 0.0
    tied = _tied(shared, rank)
    for name, count in counts.items():
        kernels = shared.pricer.kernels[name]
        for held in held_parameters(kernels.block, kernels.splits, layouts):
            if (name, held.path) in tied:
                continue
            size = float(held.spread(ranks)[0]) / float(ranks[0]) * count * FP32_BYTES
            everywhere += size if held.in_parts(layouts)[0] else 0.0
            by_head += size if held.copies[0] > 1 else 0.0
    for size in (everywhere, by_head):
        if size:
            yield "tp", "gradient_sync", "all_reduce", 1, size
