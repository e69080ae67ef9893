"""A sweep on a terminal and as a picture: the best layout at each point, and where it changes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from planner.errors import PlannerError
from planner.report.estimate import _gib as in_gib
from planner.report.estimate import _rate as in_rate
from planner.report.estimate import _say as say
from planner.report.terminal import console, show_table
from planner.spec.misfit import seconds_text
from planner.spec.sweep import Sweep, SweepPoint, Value
from planner.units import GIB

_WIDTH, _HEIGHT, _DPI = 10.0, 5.6, 110
_COLOURS = (
    "#3b6fb6", "#d9822b", "#3c8d5a", "#b0413e", "#7a5aa8", "#8c6d4f", "#c766a0", "#6b7280", "#a3a02c", "#2f9fb0",
)  # fmt: skip
_MISSING = "#e5e7eb"
_MOST_LABELS = 60  # layouts whose name stands in a cell of a map
_MOST_IN_LEGEND = 10
_HEADROOM = 1.08  # of the axis above its highest point
_FAINT, _INK = "#5c626d", "#1b1d22"


def show_sweep(sweep: Sweep) -> None:
    """The verdict, a row for each point, and where the best layout changes."""
    out = console()
    _show_verdict(out, sweep)
    out.print()
    several = sweep.minimize != "step_seconds"
    columns = [*sweep.keys, "best layout", ">step", ">tokens/s/GPU", ">GiB", *([">objective"] if several else [])]
    rows = [_row(sweep, place, several) for place in range(len(sweep.points))]
    if "gpus" not in sweep.keys and len({point.gpus for point in sweep.points}) > 1:
        columns.insert(len(sweep.keys), ">GPUs")
        rows = [
            (*row[: len(sweep.keys)], f"{point.gpus:,}", *row[len(sweep.keys) :])
            for row, point in zip(rows, sweep.points, strict=True)
        ]
    show_table(out, [*columns, ""], rows, drop=(">GiB",))
    for point in sweep.points:
        if point.gap > 0.0:
            say(out, f"! {_place(sweep, point)}: not proven, at most {100 * point.gap:.2g} % from the best")


def _show_verdict(out: Console, sweep: Sweep) -> None:
    """How many layouts are the best somewhere, where it changes, and what is missing."""
    labels = dict.fromkeys(point.label for point in sweep.points if point.strategy)
    none = sum(point.strategy is None for point in sweep.points)
    if not labels:
        say(out, f"Nothing fits at any of {len(sweep.points)} points.", style="bold red")
    elif len(labels) == 1:
        say(out, f"{next(iter(labels))} is the best at every point that fits.", style="bold green")
    else:
        say(
            out, f"{len(labels)} layouts are the best somewhere on {len(sweep.points)} points.", style="bold green"
        )
    for change in sweep.changes if len(sweep.keys) == 1 else ():
        one, other = change.before, change.after
        between = f"{sweep.keys[-1]} {_shown(one.values[-1])} and {_shown(other.values[-1])}"
        say(out, f"- between {between}: {one.label} → {other.label}")
    if none and labels:
        say(out, f"- nothing fits at {none} of {len(sweep.points)} points")
    if sweep.interrupted:
        say(out, f"Interrupted: {len(sweep.points)} of {sweep.asked} points were solved.", style="bold yellow")


def _row(sweep: Sweep, place: int, objective: bool) -> tuple[str, ...]:
    point = sweep.points[place]
    values = [_shown(value) for value in point.values]
    if point.strategy is None:
        return (*values, point.reason, *[""] * (4 if objective else 3), "")
    before = sweep.points[place - 1] if place else point
    changed = before.values[:-1] == point.values[:-1] and before.label != point.label
    cells = [
        point.label,
        seconds_text(point.step_seconds),
        in_rate(point.tokens_per_second_per_gpu),
        in_gib(point.memory_bytes),
    ]
    cells += [f"{point.objective:,.4g}"] if objective else []
    return (*values, *cells, "← changes" if changed else "")


def _place(sweep: Sweep, point: SweepPoint) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in zip(sweep.keys, point.values, strict=True))


def _shown(value: Value) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value


def sweep_png(sweep: Sweep) -> bytes:
    """The picture: a curve for one parameter, a map for two, a front against memory; the same bytes each time."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not any(point.strategy for point in sweep.points):
        raise PlannerError(
            "a picture needs a point at which something fits",
            value=f"{len(sweep.points)} points",
            remedy="vary another range",
            key="output",
        )
    figure = Figure(figsize=(_WIDTH, _HEIGHT), dpi=_DPI, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw = _draw_map if len(sweep.keys) == 2 else _draw_front if sweep.keys == ("max_memory",) else _draw_curve
    draw(axes, sweep, _colours(sweep))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    picture = io.BytesIO()
    canvas.print_figure(picture, format="png", dpi=_DPI, metadata={"Software": None})
    return picture.getvalue()


def _colours(sweep: Sweep) -> dict[str, str]:
    """Of each layout, in the order in which they come."""
    labels = dict.fromkeys(point.label for point in sweep.points if point.strategy)
    return {label: _COLOURS[place % len(_COLOURS)] for place, label in enumerate(labels)}


def _draw_curve(axes: Any, sweep: Sweep, colours: dict[str, str]) -> None:
    """Tokens a second and GPU over the parameter, an upright where the best layout changes."""
    places = _places(sweep.values[0])
    known = [(place, point) for place, point in zip(places, sweep.points, strict=False) if point.strategy]
    axes.plot(
        [place for place, _ in known], [point.tokens_per_second_per_gpu for _, point in known],
        color=_FAINT, linewidth=1.0, zorder=1,
    )  # fmt: skip
    _draw_points(axes, [(place, point) for place, point in known], colours)
    for place, after in enumerate(sweep.points[1:], start=1):
        if sweep.points[place - 1].label != after.label:
            middle = (places[place - 1] + places[place]) / 2
            axes.axvline(middle, color=_FAINT, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xticks(places, [_shown(value) for value in sweep.values[0]])
    axes.set_xlabel(_words(sweep.keys[0]))
    axes.set_title(f"The best layout over {_words(sweep.keys[0])}", loc="left", color=_INK, parse_math=False)


def _draw_front(axes: Any, sweep: Sweep, colours: dict[str, str]) -> None:
    """Tokens a second and GPU against the memory that the layout may take."""
    known = [(point.memory_high_bytes / GIB, point) for point in sweep.points if point.strategy]
    axes.plot(
        [size for size, _ in known], [point.tokens_per_second_per_gpu for _, point in known],
        color=_FAINT, linewidth=1.0, zorder=1, drawstyle="steps-pre",
    )  # fmt: skip
    _draw_points(axes, known, colours)
    axes.set_xlabel("memory of a GPU, upper end of its interval (GiB)")
    axes.set_title("Speed against memory: the best layout for each limit", loc="left", color=_INK)


def _draw_points(axes: Any, known: Sequence[tuple[float, SweepPoint]], colours: dict[str, str]) -> None:
    for place, (label, colour) in enumerate(colours.items()):
        own = [(at, point) for at, point in known if point.label == label]
        axes.scatter(
            [at for at, _ in own], [point.tokens_per_second_per_gpu for _, point in own],
            color=colour, s=36, zorder=2, label=label if place < _MOST_IN_LEGEND else None,
        )  # fmt: skip
    axes.legend(frameon=False, fontsize=8, title=_legend_title(colours), loc="lower left")
    axes.set_ylabel("tokens/s/GPU")
    axes.set_ylim(0.0, _HEADROOM * max(point.tokens_per_second_per_gpu for _, point in known))


def _legend_title(colours: dict[str, str]) -> str:
    left = len(colours) - _MOST_IN_LEGEND
    return f"best layout ({left} more not named)" if left > 0 else "best layout"


def _draw_map(axes: Any, sweep: Sweep, colours: dict[str, str]) -> None:
    """A cell for each point, coloured by its layout, with its tokens a second and GPU."""
    from matplotlib.patches import Rectangle

    down, along = sweep.values
    named = len(sweep.points) <= _MOST_LABELS
    for point in sweep.points:
        row, column = down.index(point.values[0]), along.index(point.values[1])
        colour = colours.get(point.label, _MISSING)
        axes.add_patch(Rectangle((column, row), 1.0, 1.0, facecolor=colour, edgecolor="white", alpha=0.75))
        words = f"{point.label}\n{in_rate(point.tokens_per_second_per_gpu)}" if point.strategy else "–"
        if named:
            axes.text(column + 0.5, row + 0.5, words, ha="center", va="center", fontsize=_letters(len(along)),
                      color=_INK, parse_math=False)  # fmt: skip
    axes.set_xlim(0, len(along))
    axes.set_ylim(0, len(down))
    axes.set_xticks([place + 0.5 for place in range(len(along))], [_shown(value) for value in along])
    axes.set_yticks([place + 0.5 for place in range(len(down))], [_shown(value) for value in down])
    axes.set_xlabel(_words(sweep.keys[1]))
    axes.set_ylabel(_words(sweep.keys[0]))
    axes.set_title("The best layout and its tokens/s/GPU", loc="left", color=_INK)


def _letters(columns: int) -> float:
    return max(4.5, min(9.0, 48.0 / columns))


def _places(values: Sequence[Value]) -> list[float]:
    """Where values stand on a logarithmic scale; evenly where they are words."""
    numbers = [_number(value) for value in values]
    if any(number is None or number <= 0.0 for number in numbers):
        return [float(place) for place in range(len(values))]
    return [math.log2(number) for number in numbers if number]


def _number(value: Value) -> float | None:
    if isinstance(value, str):
        try:
            return float(value.removesuffix("x"))
        except ValueError:
            return None
    return float(value)


def _words(key: str) -> str:
    return key.replace("_", " ")
