"""Gradients and parameters between data-parallel ranks: what a step exchanges, and what of it is exposed.

Two ways. *Once a step* (no sharding; ZeRO-1 and 2 of Megatron; pipelines of torch): gradients are reduced in
buckets beside the last microbatch's backward, gathered parameters beside the first forward; exposed is the last
bucket and what outlasts the work beside it. *With every block* (FSDP2): parameters are gathered a block ahead and
gradients scattered a block behind; each takes the longer of its computation and its exchange, and what runs beside
the other slows it. ZeRO-3 gathers in every microbatch, and layers again in backward; ZeRO-1 and 2 gather in the
first, and ZeRO-1 scatters in the last.

FSDP2 exchanges buffers: gathered parameters are copied out of them, gradients into them, beside nothing. Where
nothing is sharded nor cast the executor does without it and packs gradients once. Megatron keeps both where they
are exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.cost.layouts import Bools, Floats, Layouts
from planner.cost.network import GroupAxis, MeshRows, Network
from planner.spec.hardware import SoftwareStack
from planner.spec.workload import TrainWorkload
from planner.units import FP32_BYTES

_MEGATRON_BUCKET_ELEMENTS = 40_000_000  # Megatron's default: the larger of this and a million per rank
_MEGATRON_BUCKET_PER_RANK = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Seconds of one group's exchange of so many parameters' gradients or values."""

    reduce: Floats
    gather: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """Putting gradients into the buffers of an exchange, and taking parameters out: bytes moved, or seconds."""

    gradients: Floats
    values: Floats


def packs(layouts: Layouts, workload: TrainWorkload, *, width: float, experts: bool) -> Bools:
    """Whether gradients are summed by the executor itself: every rank has all weights as it computes with them."""
    as_kept = (width == FP32_BYTES) & (layouts.gradient_bytes == FP32_BYTES)
    return np.asarray((layouts.zero == 0) & as_kept & (workload.stack != "megatron") & (not experts))


def copies(
    layouts: Layouts, workload: TrainWorkload, parameters: Floats, *, width: float, experts: bool
) -> Copies:
    """Of so many parameters of a rank, by torch's FSDP2 (`foreach_reduce`, `wait_for_unshard`) or by the executor.

    A gradient is copied into its buffer, and where nothing is scattered divided and copied once more. A shard is
    cast and copied into what is gathered, and the whole copied out of it; without shards only the cast is left.
    """
    if workload.stack == "megatron":
        return Copies(gradients=np.zeros_like(parameters), values=np.zeros_like(parameters))
    shards, each = np.maximum(layouts.dp_shard, 1), layouts.gradient_bytes
    packed = packs(layouts, workload, width=width, experts=experts)
    exchanged, alone = layouts.dp * layouts.cp > 1, shards == 1
    cast = FP32_BYTES + width
    values = 2 * width + np.where(alone, cast * (width < FP32_BYTES), cast / shards)
    values = np.where(packed, 0.0, values)
    gradients = width + each + np.where(alone & ~packed, 4 * each, 0.0)
    return Copies(gradients=parameters * gradients * exchanged, values=parameters * values * exchanged)


def with_every_block(layouts: Layouts, workload: TrainWorkload) -> Bools:
    """Whether parameters are gathered block by block; a pipeline of torch's keeps them between microbatches."""
    megatron = workload.stack == "megatron"
    return np.asarray(layouts.zero == 3 if megatron else (layouts.zero > 0) & (layouts.pp == 1))


def exchange(
    network: Network,
    meshes: MeshRows,
    layouts: Layouts,
    parameters: Floats,
    *,
    width: float,
    experts: bool = False,
) -> Exchange:
    """Reducing the gradients of so many parameters, and gathering their values in the working precision."""
    gradients, values = parameters * layouts.gradient_bytes, parameters * width
    if experts:
        whole: GroupAxis = "expert_data"
        reduced = network.seconds("all_reduce", whole, meshes, gradients)
        scattered = network.seconds("reduce_scatter", whole, meshes, gradients)
        gathered = network.seconds("all_gather", whole, meshes, values)
    else:
        reduced = network.seconds("all_reduce", "data", meshes, gradients)
        scattered = network.seconds("reduce_scatter", "shard", meshes, gradients)
        copies = network.seconds("all_reduce", "copies", meshes, gradients / np.maximum(layouts.dp_shard, 1))
        scattered = scattered + copies
        gathered = network.seconds("all_gather", "shard", meshes, values)
    some, sharded = parameters > 0, layouts.zero > 0
    return Exchange(
        reduce=np.where(some, np.where(sharded, scattered, reduced), 0.0),
        gather=np.where(some & sharded, gathered, 0.0),
    )


def overlaps(layouts: Layouts, software: SoftwareStack) -> Bools:
    """Whether exchanges run beside computation: where launches wait for one another, nothing does."""
    return np.asarray(layouts.overlap_dp & (software.blocking == 0.0))


def last_share(layouts: Layouts, parameters: Floats, largest_block: Floats, workload: TrainWorkload) -> Floats:
    """Of so many parameters, the share whose gradients are reduced last: a bucket of Megatron's, else a block."""
    if workload.stack == "megatron":
        size = np.maximum(_MEGATRON_BUCKET_ELEMENTS, _MEGATRON_BUCKET_PER_RANK * layouts.dp * layouts.cp)
        return np.asarray(np.minimum(1.0, size / np.maximum(parameters, 1.0)))
    return np.asarray(largest_block / np.maximum(parameters, 1.0))


def exposed(transfer: Floats, window: Floats, last: Floats, overlapped: Bools) -> Floats:
    """What a transfer adds to a step: all of it, or its last part and what outlasts the window beside it."""
    beside = np.maximum(transfer * last, transfer - window)
    return np.asarray(np.where(overlapped, beside, transfer))


def beside(work: Floats, transfer: Floats, slower_work: float, slower_transfer: float) -> Floats:
    """Work and a transfer at once: each slows the other while both run.

    Both run until the shorter one ends, by then at their slowed rates; what is left of the longer one goes on
    alone.
    """
    slow_work, slow_transfer = work * slower_work, transfer * slower_transfer
    work_left = work - slow_transfer / slower_work
    transfer_left = transfer - slow_work / slower_transfer
    return np.asarray(np.where(slow_work >= slow_transfer, slow_transfer + work_left, slow_work + transfer_left))
