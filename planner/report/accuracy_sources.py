"""What each source measured, in a line: whose numbers a reader compares with."""

from __future__ import annotations

import re
from collections.abc import Sequence

from planner.report.accuracy import Validation
from planner.spec.runs import Run

SOURCE_COLUMNS = ("source", ">rows", "hardware", ">GPUs", "models", "precision", "software")
_MOST_NAMES = 3
_VERSION = re.compile(r"\s\d[\d.]*$")


def source_rows(validation: Validation) -> list[tuple[str, ...]]:
    """The cells of every source with predicted runs under `SOURCE_COLUMNS`; doubtful runs are counted too."""
    runs = [prediction.run for prediction in validation.predictions if prediction.estimate is not None]
    names = dict.fromkeys(run.source for run in runs)
    return [_row(name, [run for run in runs if run.source == name]) for name in names]


def _row(name: str, runs: Sequence[Run]) -> tuple[str, ...]:
    gpus = [run.gpus for run in runs]
    return (
        name,
        str(len(runs)),
        _listed([run.hardware if isinstance(run.hardware, str) else str(run.hardware["base"]) for run in runs]),
        f"{min(gpus)}" if min(gpus) == max(gpus) else f"{min(gpus)} to {max(gpus)}",
        _listed([str(run.model.get("name", "unnamed")) for run in runs]),
        _listed([str(run.workload.get("precision", "")) for run in runs], most=8),
        _listed([_VERSION.sub("", run.software) for run in runs]),
    )


def _listed(words: Sequence[str], most: int = _MOST_NAMES) -> str:
    """The most frequent ones, and how many others there are."""
    counts = {word: words.count(word) for word in words}
    first = sorted(counts, key=lambda word: -counts[word])
    hidden = len(first) - most
    return ", ".join(first[:most]) + (f" and {hidden} more" if hidden > 0 else "")
