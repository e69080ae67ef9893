"""A step of any number of ranks on one process: the executor's own code, without values and without peers.

The collectives are what it really issues; the memory is what its tensors take, before an allocator rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast, get_args

import torch.distributed as dist

from planner.errors import PlannerError
from planner.execute.collectives import CountedCollective
from planner.execute.dry_rank import DryRank
from planner.execute.fused import fused_kernels
from planner.execute.memory import Peak
from planner.execute.mesh import Meshes, build_meshes, first_rank_of_stage
from planner.spec.model import ModelSpec
from planner.spec.orders import orders
from planner.spec.paths import Span
from planner.spec.plan import CollectiveAxis, CollectiveKind, ExpectedCollective, ModuleSplit, Phase
from planner.spec.strategy import Recompute, Strategy
from planner.spec.workload import TrainWorkload

PHASES: tuple[str, ...] = get_args(Phase)


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What one rank of a pipeline stage does in a steady optimizer step."""

    collectives: tuple[CountedCollective, ...]
    peak: Peak

    def as_expected(self, stages: Span) -> tuple[ExpectedCollective, ...]:
        """The collectives as a plan lists them, groups of different size along one axis put together."""
        sums: dict[tuple[CollectiveAxis, Phase, CollectiveKind], tuple[int, int]] = {}
        for call in self.collectives:
            assert call.phase in PHASES, f"a {call.kind} in phase {call.phase}"
            key = call.axis, cast("Phase", call.phase), call.kind
            count, size = sums.get(key, (0, 0))
            sums[key] = count + call.count, size + call.bytes
        return tuple(
            ExpectedCollective(stages=stages, axis=axis, phase=part, kind=kind, count=count, bytes=size)
            for (axis, part, kind), (count, size) in sums.items()
        )


def dry_run(
    spec: ModelSpec,
    strategy: Strategy,
    workload: TrainWorkload,
    splits: Mapping[str, ModuleSplit],
    *,
    layers: Span | Sequence[Span] | None = None,
    stage: int = 0,
    recompute: Mapping[str, Recompute] | None = None,
    clip: bool = False,
) -> DryRun:
    """One pipeline rank's step: microbatches in its schedule's order, AdamW, with `clip` the norm of gradients.

    `layers` are those of rank `stage`, of each of its virtual stages. The first of all virtual stages has the
    embedding, the last the head.
    """
    whole = Span(0, spec.layers - 1) if layers is None else layers
    spans = [whole] if isinstance(whole, Span) else whole
    count = strategy.microbatches(workload.global_batch)
    with fake_world(strategy.gpus, first_rank_of_stage(strategy, stage)), fused_kernels():
        meshes = meshes_of(spec, strategy)
        rank = DryRank(spec, meshes, workload, splits, spans, rank=stage, recompute=recompute)
        order = orders(strategy.schedule, strategy.pp, strategy.vpp, count)[stage]
        step = rank.step(order, clip=clip)
    return DryRun(collectives=step.collectives, peak=step.peak)


def meshes_of(spec: ModelSpec, strategy: Strategy) -> Meshes:
    """The groups of this rank of the running world under a model."""
    return build_meshes(strategy, kv_heads=spec.kv_heads, experts=spec.moe is not None, tied=spec.tied_embeddings)


@contextmanager
def fake_world(ranks: int, rank: int = 0) -> Iterator[None]:
    """A process group of any size whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if dist.is_initialized():
        raise PlannerError(
            "a dry run starts a process group of its own",
            value="one is running",
            remedy="dry-run in a process outside torchrun",
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
