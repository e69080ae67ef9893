"""Pictures of predictions beside measurements, each a PNG that stands alone."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from planner.report.accuracy import LEAST_MEMORY_BYTES, Validation
from planner.units import GIB

_DPI = 110
_BAND = 0.1  # drawn around equality
_MARKERS = "osD^vP*X<>ph"
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bb5566", "#004488", "#ddaa33",
            "#555555", "#99ddff", "#882255")  # fmt: skip
_FARTHEST = 1.5  # errors beyond are drawn at the edge
_LONGEST_NAME = 40


def draw_times(validation: Validation) -> bytes | None:
    """Predicted against measured step time, both axes logarithmic."""
    rows = [row for row in validation.predictions if row.time_error is not None]
    points = [
        (row.run.source, row.run.step_seconds or 0.0, row.step_seconds or 0.0, row.run.trust) for row in rows
    ]
    return _scatter(points, "step time, seconds", "Step time") if points else None


def draw_memory(validation: Validation) -> bytes | None:
    """Predicted against measured memory, as each source counts it."""
    rows = [row for row in validation.predictions if row.memory_error is not None]
    points = [
        (f"{row.run.source}: {memory.counts}", memory.bytes / GIB, (row.memory_bytes or 0.0) / GIB, row.run.trust)
        for row in rows
        if (memory := row.run.memory) is not None
    ]
    return _scatter(points, "peak memory, GiB", "Peak memory", LEAST_MEMORY_BYTES / GIB) if points else None


def draw_residuals(validation: Validation) -> bytes | None:
    """Errors of the step time by source, and by the share of communication in the predicted step."""
    rows = [row for row in validation.predictions if row.time_error is not None]
    if not rows:
        return None
    sources = list(dict.fromkeys(row.run.source for row in rows))
    figure, canvas = _figure(11.0, 2.6 + 0.32 * len(sources))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    for index, source in enumerate(sources):
        own = [row for row in rows if row.run.source == source]
        errors = [_clipped(row.time_error) for row in own]
        spread = [index + 0.32 * math.sin(12.9898 * position) for position in range(len(own))]
        shares = [row.communication_share for row in own]
        for doubtful in (False, True):
            style = _style(index, doubtful=doubtful) | {"linestyle": "none", "markersize": 3.5, "alpha": 0.5}
            at = [place for place, row in enumerate(own) if (row.run.trust == "C") == doubtful]
            left.plot([errors[place] for place in at], [spread[place] for place in at], **style)
            right.plot([shares[place] for place in at], [errors[place] for place in at], **style)
        middle = sorted(errors)[len(errors) // 2]
        left.plot([middle, middle], [index - 0.42, index + 0.42], color="black", linewidth=1.6, zorder=5)
    counts = [sum(row.run.source == source for row in rows) for source in sources]
    labels = [f"{_short(source)} ({count})" for source, count in zip(sources, counts, strict=True)]
    left.set_yticks(range(len(sources)), labels, fontsize=8)
    left.set_ylim(len(sources) - 0.4, -0.6)
    left.set_xlabel("predicted / measured − 1; black: median")
    left.set_title("Error of the step time by source", fontsize=10)
    right.set_xlabel("share of exposed communication in the predicted step")
    right.set_title("… and by communication", fontsize=10)
    left.xaxis.set_major_formatter(_percent)
    right.xaxis.set_major_formatter(_percent)
    right.yaxis.set_major_formatter(_percent)
    for axes, span in ((left, left.axvspan), (right, right.axhspan)):
        span(-_BAND, _BAND, color="0.9", zorder=0)
        axes.grid(alpha=0.3)
    left.axvline(0.0, color="0.4", linewidth=0.8)
    right.axhline(0.0, color="0.4", linewidth=0.8)
    return _png(canvas)


def _scatter(
    points: Sequence[tuple[str, float, float, str]], unit: str, title: str, least: float | None = None
) -> bytes:
    """Points of (source, measured, predicted, trust) with the band of ±10 %; a line where judging begins."""
    sources = list(dict.fromkeys(source for source, *_ in points))
    figure, canvas = _figure(9.0, max(5.6, 1.2 + 0.21 * len(sources)))
    axes = figure.subplots()
    values = [value for _, measured, predicted, _ in points for value in (measured, predicted) if value > 0.0]
    low, high = min(values) / 1.4, max(values) * 1.4
    ends, below, above = ([factor * end for end in (low, high)] for factor in (1.0, 1.0 - _BAND, 1.0 + _BAND))
    axes.fill_between(ends, below, above, color="0.88", zorder=0, label="±10 %")
    axes.plot([low, high], [low, high], color="0.45", linewidth=0.8)
    if least is not None:
        axes.axvline(least, color="0.45", linewidth=0.8, linestyle=":")
    for index, source in enumerate(sources):
        own = [point for point in points if point[0] == source]
        for doubtful in (False, True):
            drawn = [point for point in own if (point[3] == "C") == doubtful]
            if not drawn:
                continue
            style = _style(index, doubtful=doubtful)
            label = f"{_short(source)}{', trust C' if doubtful else ''} ({len(drawn)})"
            axes.plot([p[1] for p in drawn], [p[2] for p in drawn], **style, linestyle="none", alpha=0.65,
                      markersize=4.5, label=label)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_xlabel(f"measured {unit}")
    axes.set_ylabel(f"predicted {unit}")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which="major")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _png(canvas)


def pictures(validation: Validation) -> dict[str, bytes]:
    """Every picture that there is something to draw in, by the name of its file."""
    draw: Iterable[tuple[str, Callable[[Validation], bytes | None]]] = (
        ("step-time.png", draw_times), ("residuals.png", draw_residuals), ("memory.png", draw_memory)
    )  # fmt: skip
    drawn = ((name, function(validation)) for name, function in draw)
    return {name: picture for name, picture in drawn if picture is not None}


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, FigureCanvasAgg(figure)


def _png(canvas: Any) -> bytes:
    picture = io.BytesIO()
    canvas.print_figure(picture, format="png", dpi=_DPI, metadata={"Software": None})
    return picture.getvalue()


def _style(index: int, *, doubtful: bool) -> dict[str, Any]:
    colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
    hollow = {"markerfacecolor": "none"} if doubtful else {}
    return {"color": colour, "marker": marker, "markeredgewidth": 0.8} | hollow


def _percent(share: float, _: int) -> str:
    return f"{100 * share:.0f} %"


def _clipped(error: float | None) -> float:
    return min(_FARTHEST, error or 0.0)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
