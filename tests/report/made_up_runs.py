"""Runs and estimates with numbers that can be checked by hand."""

from __future__ import annotations

from typing import Any

from planner.spec.estimate import Estimate, Interval, Memory, SourceShares, StepTime, Uncertainty
from planner.spec.runs import Counts, MeasuredMemory, Run, Trust
from planner.spec.runs_predicted import Prediction
from planner.spec.strategy import Strategy
from planner.spec.workload import workload_from_dict

WORKLOAD = {"seq_len": 1024, "global_batch": 32, "precision": "bf16"}


def made_up_run(
    name: str = "a",
    *,
    source: str = "ours",
    seconds: float | None = 1.0,
    memory: tuple[float, Counts] | None = None,
    trust: Trust = "A",
    tp: int = 1,
    model: str = "m",
    software: str = "s",
    excluded: str = "",
) -> Run:
    """A run on eight GPUs."""
    return Run(
        id=name,
        source=source,
        where="runs.csv:2",
        model={"name": model},
        hardware="dgx-h100",
        gpus=8,
        workload=WORKLOAD,
        strategy={"tp": tp, "dp": 8 // tp},
        step_seconds=seconds,
        memory=MeasuredMemory(bytes=memory[0], counts=memory[1]) if memory else None,
        trust=trust,
        software=software,
        excluded=excluded,
    )


def made_up_estimate(
    seconds: float = 1.0,
    *,
    allocated: float = 10e9,
    waits: float = 0.0,
    strategy: Any = None,
    capacity: float = 80e9,
) -> Estimate:
    """A tenth more is reserved, and 1 GB is the driver's; intervals reach a tenth to both sides."""
    memory = Memory(weights_bytes=allocated, reserve_bytes=0.1 * allocated, context_bytes=1e9)
    layout = Strategy.from_dict(strategy or {}, gpus=8)
    return Estimate(
        model="m",
        hardware="dgx-h100",
        gpus=8,
        workload=workload_from_dict(WORKLOAD),
        strategy=layout,
        tokens_per_second_per_gpu=1.0,
        mfu=0.4,
        capacity_bytes=capacity,
        breakdown=StepTime(matmul_seconds=seconds - waits, tp_seconds=waits),
        memory_per_stage=(memory,) * layout.pp,
        uncertainty=Uncertainty(
            confidence=0.8,
            regime="made up",
            step_seconds=Interval(low=0.9 * seconds, high=1.1 * seconds),
            memory_bytes=Interval(low=0.9 * memory.device_bytes, high=1.1 * memory.device_bytes),
            sources=SourceShares(assumed=1.0),
        ),
    )


def made_up_prediction(run: Run, seconds: float = 1.0, **of_estimate: Any) -> Prediction:
    """A run with an estimate of so many seconds."""
    return Prediction(run=run, estimate=made_up_estimate(seconds, **of_estimate))
