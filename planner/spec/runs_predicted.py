"""A measured run beside what was predicted for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.spec.estimate import Estimate
from planner.spec.files import read_yaml
from planner.spec.runs import Run
from planner.spec.yaml_text import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A run and its estimate, or the reason why there is none."""

    run: Run
    estimate: Estimate | None = None
    reason: str = ""  # why it was not predicted

    @property
    def step_seconds(self) -> float | None:
        """The predicted step, where a step was measured."""
        return self.estimate.step_seconds if self.estimate and self.run.step_seconds else None

    @property
    def memory_bytes(self) -> float | None:
        """The predicted peak, counting what the measured one counts."""
        if self.estimate is None or self.run.memory is None:
            return None
        last = self.run.memory.rank == "last"
        memory = self.estimate.memory_per_stage[-1] if last else self.estimate.memory
        return {
            "allocated": memory.allocated_bytes,
            "reserved": memory.reserved_bytes,
            "device": memory.device_bytes,
        }[self.run.memory.counts]

    @property
    def time_error(self) -> float | None:
        """Predicted over measured step, less one: .1 is 10 % too slow."""
        predicted, measured = self.step_seconds, self.run.step_seconds
        return predicted / measured - 1.0 if predicted is not None and measured else None

    @property
    def memory_error(self) -> float | None:
        """Predicted over measured bytes, less one."""
        predicted = self.memory_bytes
        return predicted / self.run.memory.bytes - 1.0 if predicted is not None and self.run.memory else None

    @property
    def time_inside(self) -> bool | None:
        """Whether the measured step lies inside the predicted interval."""
        if self.estimate is None or not self.run.step_seconds:
            return None
        interval = self.estimate.uncertainty.step_seconds
        return interval.low <= self.run.step_seconds <= interval.high

    @property
    def memory_below(self) -> bool | None:
        """Whether the measured peak lies below the upper end that `fits` compares.

        That end is of the device's view; what lies between the estimate and it is allowed to allocated and
        reserved bytes too.
        """
        predicted = self.memory_bytes
        if self.estimate is None or self.run.memory is None or predicted is None:
            return None
        margin = self.estimate.uncertainty.memory_bytes.high - self.estimate.memory_bytes
        return self.run.memory.bytes <= predicted + margin

    @property
    def communication_share(self) -> float:
        """Share of the predicted step that waits for other GPUs, the pipeline's bubble left out."""
        if self.estimate is None:
            return 0.0
        step = self.estimate.breakdown
        waits = step.tp_seconds + step.cp_seconds + step.ep_seconds + step.dp_seconds + step.pp_seconds
        return waits / step.total_seconds if step.total_seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """One row of the answer as plain data."""
        run, memory = self.run, self.run.memory
        data: dict[str, Any] = {
            "id": run.id, "source": run.source, "where": run.where, "trust": run.trust,
            "model": run.model.get("name", ""), "gpus": run.gpus, "layout": run.layout if run.strategy else "",
            "software": run.software, "assumed": list(run.assumed),
        }  # fmt: skip
        if run.excluded or self.reason:
            return data | {"excluded": run.excluded} if run.excluded else data | {"not_predicted": self.reason}
        if run.step_seconds:
            data |= {"step_seconds": run.step_seconds, "predicted_step_seconds": self.step_seconds,
                     "time_error": self.time_error, "inside_interval": self.time_inside}  # fmt: skip
        if memory is not None:
            data |= {"memory_bytes": memory.bytes, "memory_counts": memory.counts,
                     "predicted_memory_bytes": self.memory_bytes, "memory_error": self.memory_error,
                     "below_upper_end": self.memory_below}  # fmt: skip
        return data


def predicted(run: Run, estimate: Callable[..., Estimate]) -> Prediction:
    """The prediction of a run by something of the signature of `planner.estimate`.

    Where the source does not say what was recomputed and a run without any would surely not fit (not even at the
    lower end of its interval), the run must have recomputed something: the cheapest that fits is assumed, under
    Megatron's recipes selected modules, never whole blocks.
    """
    if not run.judged:
        return Prediction(run=run)
    try:
        found = _estimated(run, estimate)
        if "recompute" in run.assumed and found.uncertainty.memory_bytes.low > found.capacity_bytes:
            recipes = run.workload.get("stack") == "megatron"
            found = _estimated(run, estimate, recompute="selective" if recipes else "auto")
    except PlannerError as error:
        value = f" ({error.key}: {error.value})" if error.value else ""
        return Prediction(run=run, reason=f"{error.rule}{value}")
    return Prediction(run=run, estimate=found)


def remembered(estimate: Callable[..., Estimate]) -> Callable[..., Estimate]:
    """The same estimator, asked once for each configuration: tables hold repeats."""
    known: dict[str, Estimate] = {}

    def ask(**given: Any) -> Estimate:
        key = _key(given)
        if key not in known:
            known[key] = estimate(**given)
        return known[key]

    return ask


def _estimated(run: Run, estimate: Callable[..., Estimate], **changes: Any) -> Estimate:
    return estimate(
        model=dict(run.model),
        hardware=run.hardware if isinstance(run.hardware, str) else dict(run.hardware),
        gpus=run.gpus,
        workload=dict(run.workload),
        strategy={**run.strategy, **changes},
    )


def left_out_errors(given: str | Path | Mapping[str, float], sources: Sequence[str]) -> dict[str, float]:
    """Mean errors of sources, with constants fitted without them: `{source: share}`, or a JSON file of that."""
    data, place = (given, Source()) if isinstance(given, Mapping) else read_yaml(Path(given))
    if not isinstance(data, Mapping) or not set(data) & set(sources):
        raise PlannerError(
            "errors of left-out sources are shares by source of the tables",
            value=data,
            remedy=f'give {{"SOURCE": 0.08}}, where SOURCE is one of {", ".join(sources)}',
            key="left_out",
            where=place.place(()),
        )
    for name, share in data.items():
        number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if not number or not 0.0 <= share < float("inf"):
            raise PlannerError(
                "the error of a left-out source is a share that is not negative",
                value=share,
                remedy="write 0.08 for 8 %",
                key=f"left_out.{name}",
                where=place.place((name,)),
            )
    return {str(name): float(share) for name, share in data.items()}


def task_of(run: Run) -> str:
    """What was to be done, whatever the layout: runs that agree here may be ranked by time."""
    return _key(run.source, run.software, run.model, run.hardware, run.gpus, run.workload)


def configuration_of(run: Run) -> str:
    """Task and layout: runs that agree here are repeats, whatever the version of the software."""
    return _key(run.source, run.model, run.hardware, run.gpus, run.workload, run.strategy)


def _key(*parts: Any) -> str:
    return json.dumps(parts, sort_keys=True, default=dict)
