"""One layout's estimate in full: step time, memory of every stage, intervals, and what a user should know."""

from __future__ import annotations

from dataclasses import replace

from planner.cost.times import PARTS
from planner.cost.training import SharedStages, TrainingCost
from planner.cost.uncertainty import uncertainty
from planner.cost.warnings import training_warnings
from planner.cost.ways import Arrangement
from planner.spec.estimate import Estimate, StepTime
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.orders import in_two_parts
from planner.spec.strategy import Recompute, Strategy
from planner.spec.workload import TrainWorkload

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")  # the cheapest first


def training_estimate(
    graph: Graph, profile: HardwareProfile, workload: TrainWorkload, strategy: Strategy
) -> Estimate:
    """The estimate of one layout, its layers spread evenly.

    Under `recompute: auto` it is the cheapest that fits, the last that can run where none does.
    """
    cost = TrainingCost(graph, profile, workload)
    if strategy.recompute != "auto":
        return _estimate(cost, strategy, cost.alone(strategy))
    for recompute in _RECOMPUTE[:1] if in_two_parts(strategy.schedule, strategy.pp) else _RECOMPUTE:
        layout = replace(strategy, recompute=recompute)
        found = _estimate(cost, layout, cost.alone(layout))
        if found.fits:
            break
    return found


def arranged_estimate(
    graph: Graph, profile: HardwareProfile, workload: TrainWorkload, arrangement: Arrangement
) -> Estimate:
    """The estimate of a layout with its stages and the way of each block."""
    cost = TrainingCost(graph, profile, workload, arrangement.ways)
    strategy = arrangement.strategy
    return _estimate(cost, strategy, cost.alone(strategy, arrangement.layers, arrangement.ways))


def _estimate(cost: TrainingCost, strategy: Strategy, shared: SharedStages) -> Estimate:
    graph, profile, workload = cost.graph, cost.profile, cost.workload
    seconds = zip(PARTS, shared.parts()[:, 0].tolist(), strict=True)
    step = StepTime(**{f"{part}_seconds": value for part, value in seconds})
    memory = shared.memory()
    stages = tuple(memory.memory(rank, 0) for rank in range(strategy.pp))
    device_bytes = max(item.device_bytes for item in stages)
    flops = model_flops(graph, workload)
    peak = profile.device.peak_flops(workload.precision) * strategy.gpus
    return Estimate(
        model=graph.name,
        hardware=profile.name,
        gpus=strategy.gpus,
        workload=workload,
        strategy=strategy,
        tokens_per_second_per_gpu=workload.tokens / step.total_seconds / strategy.gpus,
        mfu=flops / (peak * step.total_seconds),
        capacity_bytes=profile.device.memory_bytes,
        breakdown=step,
        memory_per_stage=stages,
        uncertainty=uncertainty(graph, profile, workload, strategy, step, device_bytes),
        warnings=training_warnings(shared, strategy, step),
    )


def model_flops(graph: Graph, workload: TrainWorkload) -> float:
    """FLOPs that the model asks for: attention whole, its backward twice its forward, nothing computed again."""
    b, s, total = 1, workload.seq_len, 0.0
    repeats = graph.repeats()
    for name, block in graph.blocks.items():
        for operator in block.operators:
            forward = operator.flops(b, s)
            attention = operator.kind == "attention" and operator.needs_grad
            backward = 2 * forward if attention else operator.backward_flops(b, s)
            total += repeats[name] * (forward + backward)
    return total * workload.global_batch
