"""How far predictions lie from measured runs: statistics of each source, and what was left out.

An error is predicted/measured − 1. Sources are averaged with equal weight (macro), so that a table of many rows
does not speak for the others; a source of a few rows enters the average only where there are no others. Runs of
trust C are counted apart and enter no average. Small peaks of memory are not judged: the driver's share and the
allocator's blocks rule them, not the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.spec.runs import Run
from planner.spec.runs_predicted import Prediction, configuration_of, task_of
from planner.units import GB

FEWEST_TO_AVERAGE = 10  # rows of a source
LEAST_MEMORY_BYTES = 2 * GB
_FEWEST_TO_RANK = 3

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Relative errors of some rows."""

    rows: int
    mape: float  # mean absolute
    bias: float  # mean; above 0: predicted too slow or too large
    median: float  # absolute
    p90: float  # absolute; nine rows of ten are closer


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """By how much repeats of one configuration lie from their mean: no model can be closer."""

    rows: int  # that have a repeat
    configurations: int
    mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """How much slower than the fastest measured layout the one is that we would pick."""

    groups: int  # of runs that differ in their layout only
    mean: float
    worst: float
    best_picked: int  # groups in which the fastest was picked


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """Rows whose measurement lies where the estimate's interval says."""

    rows: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceAccuracy:
    """One source: errors of time and memory, and what they should be seen against."""

    source: str
    runs: int  # in the table
    excluded: int
    not_predicted: int
    time: Errors | None = None
    rank_correlation: float | None = None  # Spearman's
    noise: Noise | None = None
    regret: Regret | None = None
    inside: Coverage | None = None  # of the time interval
    memory: Errors | None = None
    memory_small: int = 0  # peaks that are too small to judge
    memory_below: Coverage | None = None  # under the upper end of the memory interval
    left_out: float | None = None  # MAPE of constants fitted without this source


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Predictions beside measurements, by source."""

    files: tuple[str, ...]
    predictions: tuple[Prediction, ...]  # of every row, in the order of the files
    sources: tuple[SourceAccuracy, ...]  # trust A and B
    doubtful: tuple[SourceAccuracy, ...] = ()  # trust C
    confidence: float | None = None  # of the intervals
    left_out: Mapping[str, float] = field(default_factory=dict)

    @property
    def averaged(self) -> tuple[SourceAccuracy, ...]:
        """Sources that the mean of the time is over."""
        return _of_enough([source for source in self.sources if source.time], lambda source: source.time)

    @property
    def memory_averaged(self) -> tuple[SourceAccuracy, ...]:
        """Sources that the mean of the memory is over."""
        return _of_enough([source for source in self.sources if source.memory], lambda source: source.memory)

    @property
    def macro_mape(self) -> float | None:
        """Mean over sources of the time's MAPE."""
        return _mean(source.time.mape for source in self.averaged if source.time)

    @property
    def macro_memory_mape(self) -> float | None:
        """Mean over sources of the memory's MAPE."""
        return _mean(source.memory.mape for source in self.memory_averaged if source.memory)

    @property
    def macro_left_out(self) -> float | None:
        """Mean over sources of the MAPE with constants fitted without each."""
        return _mean(source.left_out for source in self._left_out if source.left_out is not None)

    @property
    def macro_beside_left_out(self) -> float | None:
        """The mean with the shipped constants over the same sources."""
        return _mean(source.time.mape for source in self._left_out if source.time)

    @property
    def inside(self) -> Coverage | None:
        """Measured steps inside their intervals, all sources together."""
        return _together([source.inside for source in self.sources])

    @property
    def memory_below(self) -> Coverage | None:
        """Measured peaks under the upper ends of their intervals, all sources together."""
        return _together([source.memory_below for source in self.sources])

    @property
    def memory_small(self) -> int:
        """Peaks that are too small to judge."""
        return sum(source.memory_small for source in self.sources)

    @property
    def _left_out(self) -> list[SourceAccuracy]:
        return [source for source in self.sources if source.time and source.left_out is not None]

    def excluded_by_reason(self) -> dict[tuple[str, str], int]:
        """Rows that are not judged, by source and reason; the most frequent first."""
        return _counted((p.run.source, p.run.excluded) for p in self.predictions if p.run.excluded)

    def not_predicted_by_reason(self) -> dict[tuple[str, str], int]:
        """Rows that should be judged and have no estimate, by source and reason."""
        return _counted((p.run.source, p.reason) for p in self.predictions if p.reason)

    def to_dict(self, *, rows: bool = False) -> dict[str, Any]:
        """Plain data; with `rows`, each row too."""
        data: dict[str, Any] = {
            "files": list(self.files),
            "macro": {"mape": self.macro_mape, "memory_mape": self.macro_memory_mape,
                      "left_out_mape": self.macro_left_out, "mape_beside_left_out": self.macro_beside_left_out,
                      "sources": [source.source for source in self.averaged],
                      "memory_sources": [source.source for source in self.memory_averaged]},
            "confidence": self.confidence,
            "inside": asdict(self.inside) if self.inside else None,
            "memory_below": asdict(self.memory_below) if self.memory_below else None,
            "sources": [asdict(source) for source in self.sources],
            "doubtful": [asdict(source) for source in self.doubtful],
            "excluded": _listed(self.excluded_by_reason()),
            "not_predicted": _listed(self.not_predicted_by_reason()),
        }  # fmt: skip
        return data | ({"rows": [prediction.to_dict() for prediction in self.predictions]} if rows else {})


def judge(
    files: Sequence[str], predictions: Sequence[Prediction], left_out: Mapping[str, float] | None = None
) -> Validation:
    """Statistics of predictions; `left_out` is the MAPE of each source that somebody measured without it."""
    trusted = [prediction for prediction in predictions if prediction.run.trust != "C"]
    doubtful = [prediction for prediction in predictions if prediction.run.trust == "C"]
    confidences = [p.estimate.uncertainty.confidence for p in predictions if p.estimate]
    return Validation(
        files=tuple(files),
        predictions=tuple(predictions),
        sources=_by_source(trusted, left_out or {}),
        doubtful=_by_source(doubtful, {}),
        confidence=float(np.median(confidences)) if confidences else None,
        left_out=dict(left_out or {}),
    )


def _by_source(predictions: Sequence[Prediction], left_out: Mapping[str, float]) -> tuple[SourceAccuracy, ...]:
    names = dict.fromkeys(prediction.run.source for prediction in predictions)
    return tuple(
        _of_source(name, [p for p in predictions if p.run.source == name], left_out.get(name)) for name in names
    )


def _of_source(name: str, rows: Sequence[Prediction], left_out: float | None) -> SourceAccuracy:
    timed = [row for row in rows if row.time_error is not None and row.run.judged]
    every = [row for row in rows if row.memory_error is not None and row.run.judged]
    sized = [row for row in every if row.run.memory and row.run.memory.bytes >= LEAST_MEMORY_BYTES]
    return SourceAccuracy(
        source=name,
        runs=len(rows),
        excluded=sum(bool(row.run.excluded) for row in rows),
        not_predicted=sum(bool(row.reason) for row in rows),
        time=errors([row.time_error for row in timed]),
        rank_correlation=rank_correlation(
            [row.step_seconds or 0.0 for row in timed], [row.run.step_seconds or 0.0 for row in timed]
        ),
        noise=noise([row.run for row in rows if row.run.judged]),
        regret=regret(timed),
        inside=_coverage([row.time_inside for row in timed]),
        memory=errors([row.memory_error for row in sized]),
        memory_small=len(every) - len(sized),
        memory_below=_coverage([row.memory_below for row in sized]),
        left_out=left_out,
    )


def errors(values: Sequence[float | None]) -> Errors | None:
    """Mean, median and ninth decile of relative errors."""
    signed = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(signed):
        return None
    absolute = np.abs(signed)
    return Errors(
        rows=len(signed),
        mape=float(absolute.mean()),
        bias=float(signed.mean()),
        median=float(np.median(absolute)),
        p90=float(np.quantile(absolute, 0.9)),
    )


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's: the correlation of ranks, ties sharing their mean rank; none where all are equal."""
    if len(one) < _FEWEST_TO_RANK or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: Sequence[float]) -> Floats:
    _, position, counts = np.unique(np.array(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2.0)[position]
    return ranks


def noise(runs: Sequence[Run]) -> Noise | None:
    """Mean absolute deviation of repeats from the mean of their configuration."""
    groups = [g for g in _grouped([run for run in runs if run.step_seconds], configuration_of) if len(g) > 1]
    if not groups:
        return None
    apart: list[float] = []
    for group in groups:
        seconds = np.array([run.step_seconds for run in group], dtype=np.float64)
        apart += list(np.abs(seconds / seconds.mean() - 1.0))
    return Noise(rows=len(apart), configurations=len(groups), mean=float(np.mean(apart)))


def regret(rows: Sequence[Prediction]) -> Regret | None:
    """Of each task that was measured with several layouts; repeats of a layout count as their mean."""
    losses: list[float] = []
    for group in _grouped(rows, lambda row: task_of(row.run)):
        layouts = _grouped(group, lambda row: configuration_of(row.run))
        if len(layouts) < 2:
            continue
        measured = [float(np.mean([row.run.step_seconds or 0.0 for row in layout])) for layout in layouts]
        predicted = [float(np.mean([row.step_seconds or 0.0 for row in layout])) for layout in layouts]
        losses.append(measured[int(np.argmin(predicted))] / min(measured) - 1.0)
    if not losses:
        return None
    return Regret(
        groups=len(losses), mean=float(np.mean(losses)), worst=max(losses), best_picked=losses.count(0.0)
    )  # fmt: skip


def _grouped(items: Iterable[Any], key: Callable[[Any], str]) -> list[list[Any]]:
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _coverage(inside: Sequence[bool | None]) -> Coverage | None:
    known = [value for value in inside if value is not None]
    return Coverage(rows=len(known), share=sum(known) / len(known)) if known else None


def _together(parts: Sequence[Coverage | None]) -> Coverage | None:
    known = [part for part in parts if part is not None]
    rows = sum(part.rows for part in known)
    return Coverage(rows=rows, share=sum(part.rows * part.share for part in known) / rows) if rows else None


def _of_enough(
    sources: Sequence[SourceAccuracy], errors_of: Callable[[SourceAccuracy], Errors | None]
) -> tuple[SourceAccuracy, ...]:
    """Sources of enough rows; all where none has so many."""
    counts = [(source, found.rows) for source in sources if (found := errors_of(source)) is not None]
    return tuple(source for source, rows in counts if rows >= FEWEST_TO_AVERAGE) or tuple(sources)


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return float(np.mean(listed)) if listed else None


def _counted(items: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    return dict(sorted(Counter(items).items(), key=lambda item: (-item[1], item[0])))


def _listed(counts: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
    return [{"source": source, "reason": reason, "rows": rows} for (source, reason), rows in counts.items()]
