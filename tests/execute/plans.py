"""Plans made by hand: a strategy, the layers of its stages, and the splits of layouts.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planner.spec.model import ModelSpec
from planner.spec.orders import stage_ranks
from planner.spec.paths import NOTHING, Span
from planner.spec.plan import ModuleSplit, Plan, Stage
from planner.spec.strategy import Recompute, Strategy
from tests.execute.cases import LENGTH
from tests.execute.layouts import decoder_splits
from tests.report.plans import made_up_plan


def plan_of(
    spec: ModelSpec,
    strategy: Strategy,
    sequences: int,
    *,
    layers: Sequence[int] = (),
    splits: Mapping[str, ModuleSplit] | None = None,
    recompute: Mapping[str, Recompute] | None = None,
    precision: str = "fp32",
) -> Plan:
    """`layers` are counts by virtual stage, in the order of the model; without them all are as even as can be."""
    count = strategy.pp * strategy.vpp
    each, more = divmod(spec.layers, count)
    counts = list(layers) or [each + (stage < more) for stage in range(count)]
    assert sum(counts) == spec.layers
    held: list[list[Span]] = [[] for _ in range(strategy.pp)]
    first = 0
    for rank, size in zip(stage_ranks(strategy.schedule, strategy.pp, strategy.vpp), counts, strict=True):
        held[rank].append(Span(first, first + size - 1) if size else NOTHING)
        first += size
    plain = made_up_plan(
        gib=1 / 16,  # `run` refuses plans whose training state this machine has no memory for
        model=spec.name,
        strategy=strategy.to_dict(),
        gpus=strategy.gpus,
        workload={"seq_len": LENGTH, "global_batch": sequences, "precision": precision},
        layers=0,  # those of its stages are put in below
    )
    return replace(
        plain,
        stages=tuple(Stage(layers=tuple(spans)) for spans in held),
        modules=dict(splits if splits is not None else decoder_splits(spec, sp=strategy.sp)),
        recompute=dict(recompute or {}),
        model_spec=spec,
    ).sealed()
