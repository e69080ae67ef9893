"""A plan and what its executor does, side by side on a terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rich.text import Text

from planner.report.terminal import console, show_table
from planner.spec.verification import Parity, StageCheck, Verification
from planner.units import in_binary_bytes


def show_verification(found: Verification) -> None:
    """The verdict with the first difference, then collectives and memory of every rank, equal ones in one row."""
    out = console()
    collectives = sum(len(stage.collectives) for stage in found.stages)
    if found.agrees:
        sums = "sum of collectives is" if collectives == 1 else "sums of collectives are"
        collected = f"{collectives} {sums} equal" if collectives else "neither issues a collective"
        ranks = "one rank" if len(found.stages) == 1 else f"{len(found.stages)} pipeline ranks"
        verdict = f"The executor does what the plan says: {collected} over {ranks}"
        out.print(Text(f"{verdict}, and memory is within its interval.", style="bold green"))
    else:
        first, *others = found.differences
        out.print(Text(f"Differs: {first}.", style="bold red"))
        if others:
            out.print(Text(f"and {len(others)} more, marked below", style="red"))
    batches = f"{found.microbatches} microbatch{'es' if found.microbatches > 1 else ''}"
    out.print(f"{found.model}: {found.strategy.label}, {found.gpus:,} GPUs, {batches} a step\n")
    rows = [row for span, stage in _alike(found) for row in _collectives(span, stage)]
    if rows:
        columns = ("stage", "axis", "phase", "kind", ">planned", ">issued", ">bytes planned", ">bytes issued", "")
        show_table(out, columns, rows)
        out.print()
    peaks = ("stage", "layers", ">held", ">tensors planned", ">dry-run", ">device planned", ">found", "")
    show_table(out, peaks, [_memory(f"{stage.stage}", stage) for stage in found.stages])
    if found.parity is not None:
        out.print()
        out.print(_parity_text(found.parity))


def _collectives(span: str, stage: StageCheck) -> Iterator[tuple[str, ...]]:
    for check in stage.collectives:
        yield (
            span,
            check.axis,
            check.phase,
            check.kind,
            f"{check.planned_count:,}",
            f"{check.found_count:,}",
            in_binary_bytes(check.planned_bytes),
            in_binary_bytes(check.found_bytes),
            "" if check.agrees else "← differs",
        )


def _memory(span: str, stage: StageCheck) -> tuple[str, ...]:
    memory = stage.memory
    low, high = in_binary_bytes(memory.low_bytes), in_binary_bytes(memory.high_bytes)
    return (
        span,
        ", ".join(str(part.to_plain()) for part in stage.layers),
        f"{memory.in_flight:,}",
        in_binary_bytes(memory.planned_tensor_bytes),
        in_binary_bytes(memory.found_tensor_bytes),
        in_binary_bytes(memory.planned_bytes),
        in_binary_bytes(memory.found_bytes),
        f"within {low} to {high}" if memory.agrees else f"← outside {low} to {high}",
    )


def _alike(found: Verification) -> Iterator[tuple[str, StageCheck]]:
    """Neighbouring ranks with equal collectives as one."""
    for _, group in itertools.groupby(found.stages, key=lambda stage: stage.collectives):
        stages = list(group)
        yield _span(stages[0].stage, stages[-1].stage), stages[0]


def _parity_text(parity: Parity) -> str:
    """What ran, and how near it came."""
    ranks = f"{parity.processes} process{'es' if parity.processes > 1 else ''}"
    copied = f"A copy of {parity.layers} layer{'s' if parity.layers > 1 else ''}, {parity.strategy.label}"
    small = f"{parity.ran or copied}, on {ranks}"
    wrong = len(parity.differences)
    if wrong:
        return f"{small}: {wrong} of {len(parity.values)} values differ, by {parity.worst:.2g} at most."
    return f"{small}: {len(parity.values)} values equal one process's; the largest error is {parity.worst:.1g}."


def _span(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else f"{first}"
