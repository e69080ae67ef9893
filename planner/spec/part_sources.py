"""Where the numbers behind each part of a training step come from."""

from __future__ import annotations

from planner.spec.hardware import HardwareProfile
from planner.spec.provenance import SourceKind
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload

_WIDE = ("fp32", "bf16", "fp16")  # precisions that attention is computed in too; below them it is bf16


def part_sources(profile: HardwareProfile, workload: TrainWorkload, strategy: Strategy) -> dict[str, SourceKind]:
    """The source of each part by its key in `StepTime`; waiting has none, it follows from what is waited for."""
    products = profile.gemm_for(workload.precision).source
    attention = profile.attention.get(workload.precision if workload.precision in _WIDE else "bf16")
    sources: dict[str, SourceKind] = {
        "matmul_seconds": products,
        "attention_seconds": attention.prefill.source if attention else "assumed",
        "elementwise_seconds": profile.elementwise.origin("bandwidth_efficiency").source,
        "recompute_seconds": products,
        "optimizer_seconds": profile.elementwise.origin("bandwidth_efficiency").source,
        "host_seconds": profile.software_for(workload.stack).source,
    }
    stride = 1
    for axis in strategy.axes:
        size = getattr(strategy, axis)
        sources[f"{axis}_seconds"] = _link_source(profile, stride * (size - 1) + 1)
        stride *= size
    sources["ep_seconds"] = _link_source(profile, strategy.ep * strategy.etp)
    return sources


def _link_source(profile: HardwareProfile, reach: int) -> SourceKind:
    """The source of the outermost level that a group over so many GPUs crosses: of its tables, if it has any."""
    for level in profile.topology.values():
        if not level.gpus or reach <= level.gpus:
            tables = list(level.collectives.values())
            return tables[0].source if tables else level.source
    return "assumed"
