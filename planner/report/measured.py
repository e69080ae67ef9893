"""What a run measured, on a terminal, beside what its plan had predicted."""

from __future__ import annotations

from planner.spec.measured import Measured
from planner.spec.plan import Plan
from planner.units import in_binary_bytes, in_decimal


def measured_lines(measured: Measured, plan: Plan) -> list[str]:
    """The step, the loss, and the memory of each stage. A plan edited since predicts nothing of this run."""
    predicts = measured.layout == plan.digests.layout and not plan.edited
    step = f"{measured.strategy.label}: {_seconds(measured.step_seconds)} a step"
    counted = len(measured.counted_seconds)
    step += f" (median of {counted}, ±{_seconds(measured.spread_seconds)})" if counted > 1 else " (a single one)"
    if predicts:
        step += f", predicted {_seconds(plan.estimate.step_seconds)}"
    tokens = in_decimal(measured.tokens_per_second / measured.gpus, "tokens/s")
    lines = [step, f"{tokens} a rank on {measured.gpus} × {measured.device}, {measured.backend}"]
    last = measured.first_step + len(measured.each_seconds)
    first = f"{measured.first_loss:.4f} at step {measured.first_step + 1}"
    lines.append(f"loss {first}, {measured.last_loss:.4f} at step {last}")
    for stage, peak in measured.peak_by_stage.items():
        word = f"memory of stage {stage}: {in_binary_bytes(peak.reserved_bytes)} at its peak"
        if predicts and measured.backend != "gloo":
            word += f", predicted {in_binary_bytes(plan.estimate.memory_per_stage[stage].reserved_bytes)}"
        lines.append(word)
    return lines


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1.0 else f"{seconds:.4g} s"
