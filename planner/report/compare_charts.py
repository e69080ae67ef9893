"""What is drawn of plans side by side, as plain data: rows of coloured pieces that a page and a picture share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from planner.report.compare_verdict import Compared, incomparable
from planner.report.estimate import _gib as in_gib
from planner.report.estimate import _name as part_name
from planner.report.estimate import _percent as in_percent
from planner.report.estimate import _scaled as in_unit_of
from planner.report.estimate import _unit as unit_of
from planner.spec.estimate import Memory, StepTime

_FINEST = 4000  # places along a pipeline
_COARSER = (_FINEST, 1000, 500, 250, 125, 60)
_MOST_PIECES = 60_000  # of all pipelines together
_TOLD_APART = 3  # places that a piece has on average, at least, where directions are told apart
_DIRECTIONS = {"F": "forward", "B": "backward", "I": "backward", "W": "weight_gradients"}

# light and dark; one family of colours each for computing, communication and waiting
COLOURS: dict[str, tuple[str, str]] = {
    "matmul": ("#1f5fa8", "#4a8fdc"),
    "attention": ("#4f9bd9", "#7cbcf0"),
    "elementwise": ("#9ccbee", "#b9dcf6"),
    "recompute": ("#5a52a8", "#8d85d8"),
    "tp": ("#b3261e", "#e2665c"),
    "cp": ("#d9601a", "#f08c4f"),
    "ep": ("#e8960c", "#f5b445"),
    "dp": ("#efc42f", "#f6d660"),
    "pp": ("#a8741a", "#cf9c48"),
    "bubble": ("#b9bdc6", "#5b616e"),
    "optimizer": ("#2f8f5b", "#57b883"),
    "host": ("#86b84a", "#a9d472"),
    "other": ("#7d828c", "#9aa0ab"),
    "weights": ("#1f5fa8", "#4a8fdc"),
    "gradients": ("#4f9bd9", "#7cbcf0"),
    "optimizer_state": ("#9ccbee", "#b9dcf6"),
    "activations": ("#2f8f5b", "#57b883"),
    "recomputed": ("#5a52a8", "#8d85d8"),
    "logits": ("#a78bda", "#c3acec"),
    "gathered": ("#d9601a", "#f08c4f"),
    "buffers": ("#e8960c", "#f5b445"),
    "kv_cache": ("#86b84a", "#a9d472"),
    "rest": ("#7d828c", "#9aa0ab"),
    "reserve": ("#b9bdc6", "#767c89"),
    "context": ("#d9d9de", "#4f5460"),
    "forward": ("#4f9bd9", "#7cbcf0"),
    "backward": ("#1f5fa8", "#3f7fcf"),
    "weight_gradients": ("#5a52a8", "#8d85d8"),
    "computing": ("#1f5fa8", "#4a8fdc"),
    "message": ("#e8960c", "#f5b445"),
    "idle": ("#dcdde2", "#454a55"),
}
_MEMORY_KINDS = {"optimizer": "optimizer_state", "recompute": "recomputed", "other": "rest"}
_NAMES = {"optimizer_state": "optimizer", "recomputed": "recompute", "rest": "other", "weight_gradients":
          "weights' gradients", "message": "waiting for a message"}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A stretch of a row, from 0 to 1 of the chart's width."""

    start: float
    end: float
    kind: str
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Pieces beside one another, the later over the earlier."""

    label: str
    value: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Rows of one scale; `mark` is an upright line with its words, such as the device's memory."""

    title: str
    rows: tuple[Row, ...]
    scale: str  # what the whole width is
    note: str = ""
    mark: tuple[float, str] | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """What there is to see in it, in the order of the colours."""
        found = {piece.kind for row in self.rows for piece in row.pieces if piece.end > piece.start}
        return tuple(kind for kind in COLOURS if kind in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Charts of one thing, with one legend."""

    anchor: str
    title: str
    charts: tuple[Chart, ...]
    wide_labels: bool = False  # rows are named by plans, not by stages

    @property
    def legend(self) -> tuple[str, ...]:
        """Kinds of all the charts."""
        found = {kind for chart in self.charts for kind in chart.kinds}
        return tuple(kind for kind in COLOURS if kind in found)


def kind_name(kind: str) -> str:
    """A kind as a legend says it."""
    return _NAMES.get(kind) or part_name(kind)


def sections(entries: Sequence[Compared], most_pieces: int = _MOST_PIECES) -> tuple[Section, ...]:
    """Step time, memory and pipelines; each only where there is something to draw."""
    found = [
        Section(anchor="time", title="Step time", charts=(step_chart(entries),), wide_labels=True),
        Section(anchor="memory", title="Memory", charts=tuple(map(memory_chart, entries))),
    ]
    drawn = pipeline_charts(entries, most_pieces)
    if drawn:
        found.append(Section(anchor="pipeline", title="Pipeline of one step", charts=drawn))
    return tuple(found)


def step_chart(entries: Sequence[Compared]) -> Chart:
    """A bar for each plan, stacked by part."""
    longest = max(entry.estimate.step_seconds for entry in entries)
    whole, unit = longest or 1.0, unit_of(longest)[1]
    rows = []
    for entry in entries:
        total = entry.estimate.step_seconds
        parts = entry.estimate.breakdown.parts
        titles = {
            key: f"{part_name(key)}: {in_unit_of(seconds, longest, finer=1)} {unit}, {in_percent(seconds / total)}"
            for key, seconds in parts.items()
            if total
        }
        pieces = _stacked(StepTime, parts, whole, titles, {})
        fits = "" if entry.estimate.fits else ", does not fit"
        rows.append(Row(label=entry.short, value=f"{in_unit_of(total, longest)} {unit}{fits}", pieces=pieces))
    return Chart(title="", rows=tuple(rows), scale=f"{in_unit_of(longest, longest)} {unit}")


def memory_chart(entry: Compared) -> Chart:
    """A bar for each stage, stacked by part, against what the device has."""
    found = entry.estimate
    capacity, most = found.capacity_bytes, found.memory_bytes
    whole = 1.02 * max(capacity, most)
    rows = []
    for place, memory in enumerate(found.memory_per_stage):
        titles = {key: f"{part_name(key)}: {in_gib(size)} GiB" for key, size in memory.parts.items()}
        pieces = _stacked(Memory, memory.parts, whole, titles, _MEMORY_KINDS)
        rows.append(Row(label=_stage(place, len(found.memory_per_stage)), value=in_gib(memory.device_bytes),
                        pieces=pieces))  # fmt: skip
    fullest = found.memory_per_stage.index(found.memory)
    where = f" on stage {fullest}" if len(rows) > 1 else ""
    fits = "fits" if found.fits else f"does not fit: up to {in_gib(entry.missing_bytes)} GiB too much"
    high = found.uncertainty.memory_bytes.high
    return Chart(
        title=entry.short,
        rows=tuple(rows),
        scale=f"{in_gib(whole)} GiB",
        note=f"{in_gib(most)} of {in_gib(capacity)} GiB{where}, up to {in_gib(high)}; {fits}",
        mark=(capacity / whole, f"{in_gib(capacity)} GiB"),
    )


def pipeline_charts(entries: Sequence[Compared], most_pieces: int = _MOST_PIECES) -> tuple[Chart, ...]:
    """The timelines of plans with more than one stage; as fine as all of them together allow."""
    drawn = [(entry, entry.timeline) for entry in entries if entry.timeline and entry.plan.strategy.pp > 1]
    if not drawn:
        return ()
    alike = not incomparable([entry for entry, _ in drawn])
    longest = max(timeline["seconds"] for _, timeline in drawn)
    events = sum(len(rank["events"]) for _, timeline in drawn for rank in timeline["ranks"])
    for places in _COARSER[events > 10 * most_pieces :]:
        charts = tuple(
            _pipeline_chart(entry, timeline, longest if alike else timeline["seconds"], places)
            for entry, timeline in drawn
        )
        if sum(len(row.pieces) for chart in charts for row in chart.rows) <= most_pieces:
            break
    return charts


def _pipeline_chart(entry: Compared, timeline: Mapping[str, Any], whole: float, places: int) -> Chart:
    seconds, ranks = timeline["seconds"], timeline["ranks"]
    rows = []
    idle = 0.0
    apart = all(len(rank["events"]) * _TOLD_APART <= places * seconds / whole for rank in ranks) if whole else True
    for place, rank in enumerate(ranks):
        pieces = _events(rank["events"], whole or 1.0, places, apart=apart)
        resting = rank["bubble_seconds"] / seconds if seconds else 0.0
        idle += resting / len(ranks)
        background = Piece(start=0.0, end=seconds / whole if whole else 0.0, kind="idle")
        rows.append(Row(label=_stage(place, len(ranks)), value=in_percent(resting), pieces=(background, *pieces)))
    unit = unit_of(whole)[1]
    layout = entry.plan.strategy
    note = f"{layout.schedule}, {in_unit_of(seconds, whole)} {unit}; idle {in_percent(idle, digits=1)} on average"
    if not apart:
        note += "; too fine to tell forward from backward"
    return Chart(title=entry.short, rows=tuple(rows), scale=f"{in_unit_of(whole, whole)} {unit}", note=note)


def _events(events: Iterable[Mapping[str, Any]], whole: float, places: int, *, apart: bool) -> list[Piece]:
    """Events on a grid of places; what is finer than a place is one with what is before it."""
    found: list[tuple[int, int, str]] = []
    scale, until = places / whole, -2
    for event in events:
        kind = _DIRECTIONS.get(event["kind"], "message")
        first, last = event["start_seconds"] * scale, event["end_seconds"] * scale
        if not apart:
            if kind == "message":
                if last - first < 1.0:
                    continue
            else:
                kind = "computing"
        start, end = round(first), round(last)
        if not apart and start <= until + 1 and found[-1][2] == kind:
            until = max(end, until)
            found[-1] = (found[-1][0], until, kind)
        elif end > start:
            found.append((start, end, kind))
            until = end
    return [Piece(start=start / places, end=end / places, kind=kind) for start, end, kind in found]


def _stacked(
    cls: type, parts: Mapping[str, float], whole: float, titles: Mapping[str, str], kinds: Mapping[str, str]
) -> tuple[Piece, ...]:
    """The parts of a sum behind one another, as the dataclass orders them."""
    pieces, used = [], 0.0
    for item in fields(cls):
        size = parts[item.name]
        if size > 0.0:
            plain = item.name.removesuffix("_seconds").removesuffix("_bytes")
            kind = kinds.get(plain, plain)
            pieces.append(
                Piece(start=used / whole, end=(used + size) / whole, kind=kind, title=titles.get(item.name, ""))
            )
        used += size
    return tuple(pieces)


def _stage(place: int, stages: int) -> str:
    return f"stage {place}" if stages > 1 else "each GPU"
