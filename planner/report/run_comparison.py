"""A run beside its plan on a terminal: the verdict, then time and memory part by part."""

from __future__ import annotations

from rich.text import Text

from planner.report.terminal import console, show_table
from planner.spec.misfit import seconds_text
from planner.spec.run_comparison import PartComparison, RunComparison, StageMemory
from planner.units import in_binary_bytes


def show_run_comparison(found: RunComparison) -> None:
    """By how much the step differs and whether that was to be expected, then where."""
    out = console()
    measured = f"{seconds_text(found.measured_seconds)} ± {seconds_text(found.spread_seconds)}"
    out.print(Text(f"{_verdict(found)}: {measured}, predicted {seconds_text(found.predicted_seconds)}.", "bold"))
    low, high = seconds_text(found.interval.low), seconds_text(found.interval.high)
    inside = "within" if found.within else "outside"
    out.print(f"That is {inside} the prediction's interval, {low} to {high}; median of {found.steps} steps.")
    if found.mismatch:
        out.print(Text(f"Not the same software: {found.mismatch}.", "bold"))
    out.print(f"{found.model}: {found.label} on {found.gpus} × {found.device}\n")
    rows = [_part(part, found) for part in sorted(found.parts, key=lambda part: -part.predicted_seconds)]
    total = ("step", *_times(found.predicted_seconds, found.measured_seconds), "")
    show_table(out, ("part", ">predicted", ">measured", ">difference", ">of the step"), [*rows, total])
    out.print()
    if found.memory_compares:
        columns = ("stage", ">allocated", ">measured", ">reserved", ">of it measured", ">difference")
        show_table(out, columns, [_memory(stage) for stage in found.memory])
    else:
        out.print("Memory is not compared: on a CPU that of a process is known, not that of its tensors.")


def _verdict(found: RunComparison) -> str:
    """How much slower or faster it ran."""
    percent = 100 * abs(found.ratio - 1)
    if percent < 1:
        return "The step takes what the plan predicts"
    return f"The step is {percent:.0f} % {'slower' if found.ratio > 1 else 'faster'} than the plan predicts"


def _part(part: PartComparison, found: RunComparison) -> tuple[str, ...]:
    share = part.predicted_seconds / found.predicted_seconds
    return (part.part, *_times(part.predicted_seconds, part.measured_seconds), f"{100 * share:.0f} %")


def _times(predicted: float, measured: float | None) -> tuple[str, str, str]:
    if measured is None:
        return seconds_text(predicted), "", ""
    sign = "+" if measured >= predicted else "−"
    return seconds_text(predicted), seconds_text(measured), sign + seconds_text(abs(measured - predicted))


def _memory(stage: StageMemory) -> tuple[str, ...]:
    return (
        str(stage.stage),
        in_binary_bytes(stage.predicted_allocated_bytes),
        in_binary_bytes(stage.measured_allocated_bytes),
        in_binary_bytes(stage.predicted_reserved_bytes),
        in_binary_bytes(stage.measured_reserved_bytes),
        f"{100 * (stage.ratio - 1):+.0f} %",
    )
