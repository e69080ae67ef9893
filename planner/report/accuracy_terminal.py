"""The validation on a terminal: the verdict, a line for each source, what was left out."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from planner.report.accuracy import Validation
from planner.report.accuracy_pages import (
    COLUMNS,
    MEMORY_COLUMNS,
    counted,
    evidence,
    memory_row,
    time_row,
    verdict,
)
from planner.report.terminal import console, show_table
from planner.spec.runs import Run
from planner.spec.runs_predicted import Prediction

_DROP = (">worst", ">median", ">in interval", ">noise", ">p90", ">rank", ">regret", ">bias", ">left out")
_MOST_REASONS = 12


def watched(runs: Sequence[Run], *, quiet: bool) -> Iterator[Run]:
    """The runs one by one, under a bar on stderr where a person looks at it."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield from runs
        return
    from rich.progress import track

    yield from track(runs, description="estimating", console=console(sys.stderr), transient=True)


def show_validation(validation: Validation, *, rows: bool = False) -> None:
    """The tables; with `rows`, each run too."""
    out = console()
    out.print(verdict(validation))
    for line in evidence(validation):
        out.print(f"  {line}")
    out.print()
    if rows:
        _show_rows(validation.predictions)
    for title, sources in (("Step time", validation.sources), ("Step time, trust C", validation.doubtful)):
        cells = [time_row(source) for source in sources if source.time]
        if cells:
            columns = [title if column == "source" else column for column in COLUMNS]
            empty = [column for index, column in enumerate(COLUMNS) if all(row[index] == "–" for row in cells)]
            kept = [index for index, column in enumerate(COLUMNS) if column not in empty]
            drop = [column for column in _DROP if column not in empty]
            show_table(out, [columns[i] for i in kept], [[row[i] for i in kept] for row in cells], drop)
            out.print()
    sized = [memory_row(source) for source in validation.sources if source.memory]
    if sized:
        columns = ["Peak memory" if column == "source" else column for column in MEMORY_COLUMNS]
        show_table(out, columns, sized, (">median", ">p90", ">under upper end", ">bias"))
        out.print()
    _show_reasons("not judged", validation.excluded_by_reason())
    _show_reasons("not predicted", validation.not_predicted_by_reason())


def _show_reasons(title: str, counts: dict[tuple[str, str], int]) -> None:
    if not counts:
        return
    out = console()
    out.print(f"{counted(sum(counts.values()), 'row')} {title}")
    shown = list(counts.items())[:_MOST_REASONS]
    show_table(out, (">rows", "source", "why"), [(str(n), source, reason) for (source, reason), n in shown])
    hidden = sum(count for _, count in list(counts.items())[_MOST_REASONS:])
    out.print(f"… and {hidden} more, each with its reason in --json\n" if hidden else "")


def _show_rows(predictions: tuple[Prediction, ...]) -> None:
    columns = ("run", "source", "model", "layout", ">GPUs", ">measured s", ">predicted s", ">error", ">memory")
    cells = [
        (row.run.id, row.run.source, str(row.run.model.get("name", "")), row.run.layout, str(row.run.gpus),
         f"{row.run.step_seconds:.4g}" if row.run.step_seconds else "–",
         f"{row.step_seconds:.4g}" if row.step_seconds else "–",
         "–" if row.time_error is None else f"{100 * row.time_error:+.1f} %",
         "–" if row.memory_error is None else f"{100 * row.memory_error:+.1f} %")
        for row in predictions
        if row.estimate is not None
    ]  # fmt: skip
    show_table(console(), columns, cells, drop=("source", "model", ">GPUs", ">memory", "layout"))
    console().print()
