"""A plan's prediction beside what a run of it measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from planner.errors import PlannerError
from planner.spec.codec import Bytes, Count, Degree, Seconds, encode
from planner.spec.estimate import Interval
from planner.spec.measured import Measured, context_mismatch, stack_mismatch
from planner.spec.plan import Plan
from planner.spec.workload import Stack

_ROUNDING = 1e-9  # of a step: a part of no more is what is left of a difference


@dataclass(frozen=True, slots=True, kw_only=True)
class PartComparison:
    """A part of a step: what the plan predicts, and what the run measured where it looked."""

    part: str
    predicted_seconds: Seconds
    measured_seconds: Seconds | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """The peak of a pipeline rank. A CPU's is of the whole process and says nothing about the plan's."""

    stage: Count
    predicted_allocated_bytes: Bytes
    predicted_reserved_bytes: Bytes
    measured_allocated_bytes: Bytes
    measured_reserved_bytes: Bytes

    @property
    def ratio(self) -> float:
        """Measured over predicted, of what the allocator holds."""
        return self.measured_reserved_bytes / self.predicted_reserved_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Where a run's time and memory differ from its plan's."""

    model: str
    device: str
    gpus: Degree
    label: str
    planned_stack: Stack
    run_stack: Stack
    mismatch: str  # in words, where the run is not what the plan predicts
    predicted_seconds: Seconds
    interval: Interval
    measured_seconds: Seconds
    spread_seconds: Seconds
    steps: Count  # that the median is of
    parts: tuple[PartComparison, ...]
    memory: tuple[StageMemory, ...]
    memory_compares: bool

    DERIVED: ClassVar[tuple[str, ...]] = ("ratio", "within")

    @property
    def ratio(self) -> float:
        """Measured over predicted step."""
        return self.measured_seconds / self.predicted_seconds

    @property
    def within(self) -> bool:
        """Whether the measured step lies in the prediction's interval."""
        return self.interval.low <= self.measured_seconds <= self.interval.high

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the ratios."""
        data: dict[str, Any] = encode(self)
        return data


def compare_run(plan: Plan, measured: Measured) -> RunComparison:
    """A run beside its plan, whose figures are those of the layout that ran."""
    if measured.layout != plan.layout_digest:
        raise PlannerError(
            "a run is compared with the plan that it ran",
            value=f"the run's layout {measured.layout[:12]}…, the plan's {plan.layout_digest[:12]}…",
            remedy="give the plan as it was when it ran, or run it again",
            key="layout",
        )
    estimate = plan.estimate
    names = [key.removesuffix("_seconds") for key in estimate.breakdown.parts]
    predicted = dict(zip(names, estimate.breakdown.parts.values(), strict=True))
    parts = [
        PartComparison(part=name, predicted_seconds=seconds, measured_seconds=measured.parts.get(name))
        for name, seconds in predicted.items()
        if seconds > _ROUNDING * estimate.step_seconds or name in measured.parts
    ]
    parts += [
        PartComparison(part=name, predicted_seconds=0.0, measured_seconds=seconds)
        for name, seconds in measured.parts.items()
        if name not in predicted
    ]
    memory = [
        StageMemory(
            stage=stage,
            predicted_allocated_bytes=estimate.memory_per_stage[stage].allocated_bytes,
            predicted_reserved_bytes=estimate.memory_per_stage[stage].reserved_bytes,
            measured_allocated_bytes=peak.allocated_bytes,
            measured_reserved_bytes=peak.reserved_bytes,
        )
        for stage, peak in measured.peak_by_stage.items()
    ]
    told = (
        stack_mismatch(plan.workload.stack, measured.stack),
        context_mismatch(plan.workload.stack, measured.context, measured.strategy),
    )
    return RunComparison(
        model=plan.model,
        device=measured.device,
        gpus=measured.gpus,
        label=measured.strategy.label,
        planned_stack=plan.workload.stack,
        run_stack=measured.stack,
        mismatch="; ".join(filter(None, told)),
        predicted_seconds=estimate.step_seconds,
        interval=estimate.uncertainty.step_seconds,
        measured_seconds=measured.step_seconds,
        spread_seconds=measured.spread_seconds,
        steps=len(measured.counted_seconds),
        parts=tuple(parts),
        memory=tuple(memory),
        memory_compares=measured.backend != "gloo",
    )
