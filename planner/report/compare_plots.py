"""Plans side by side as one picture: what the page says and draws, set out so that nothing overlaps.

Every block knows its height before anything is drawn; matplotlib draws, it does not lay out.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

from planner.errors import PlannerError
from planner.report.compare_charts import COLOURS, Chart, Section, kind_name, sections
from planner.report.compare_sheet import (
    DPI,
    EDGE,
    GAP,
    INK,
    LINE,
    WIDTH,
    Block,
    Ruler,
    Sheet,
    Title,
    Words,
    rectangle,
)
from planner.report.compare_table import Fact, common_text, facts
from planner.report.compare_verdict import Compared, verdict

_STAGE_LABELS, _PLAN_LABELS, _VALUES = 0.75, 2.35, 1.5
_TALLEST = 2.6  # of a chart of many stages
_PIECES = 40_000
_MOST_PIXELS = 60_000  # matplotlib paints fewer than 65,536
_APART = 24  # rows with room between them
_COLUMNS = 6  # plans that stand beside one another in a table
_NAME_COLUMN = 2.0
_FAINT, _GOOD, _BAD, _LINES = "#5c626d", "#14713d", "#b3261e", "#d4d7dd"


def comparison_png(entries: Sequence[Compared]) -> bytes:
    """The picture; the same bytes for the same plans."""
    picture = io.BytesIO()
    with warnings.catch_warnings():  # a letter that the font lacks is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph")
        canvas = comparison_canvas(entries)
        canvas.print_figure(picture, format="png", dpi=DPI, metadata={"Software": None})
    return picture.getvalue()


def comparison_canvas(entries: Sequence[Compared]) -> Any:
    """The picture before it is painted: a canvas with its figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = _blocks(entries)
    height = sum(block.height for block in blocks) + 2 * EDGE
    if height * DPI > _MOST_PIXELS:
        raise PlannerError(
            f"a picture is at most {_MOST_PIXELS:,} pixels high",
            value=f"{height * DPI:,.0f} for {len(entries)} plans",
            remedy="compare fewer plans, or write a page: -o NAME.html",
            key="output",
        )
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    sheet = Sheet(figure=figure, height=height)
    top = EDGE
    for block in blocks:
        block.draw(sheet, top)
        top += block.height
    return canvas


class _Legend(Block):
    """Colours and what they mean, in as many lines as it takes."""

    def __init__(self, ruler: Ruler, kinds: Sequence[str]) -> None:
        self.places: list[tuple[str, float, int]] = []
        left, line = EDGE, 0
        for kind in kinds:
            width = 0.17 + ruler.width(kind_name(kind), 8.5) + 0.2
            if left + width > WIDTH - EDGE:
                left, line = EDGE, line + 1
            self.places.append((kind, left, line))
            left += width
        self.height = (line + 1) * LINE + 0.1

    def draw(self, sheet: Sheet, top: float) -> None:
        for kind, left, line in self.places:
            axes = sheet.panel(left, top + line * LINE + 0.02, 0.11, 0.11)
            axes.add_patch(rectangle(COLOURS[kind][0]))
            sheet.words(left + 0.17, top + line * LINE, kind_name(kind), size=8.5)


class _Charts(Block):
    """Charts of one section, several beside one another where there are many."""

    def __init__(self, ruler: Ruler, part: Section) -> None:
        number = len(part.charts)
        self.columns = 1 if part.wide_labels or number == 1 else 2 if number <= 4 else 3
        self.width = (WIDTH - 2 * EDGE - (self.columns - 1) * GAP) / self.columns
        self.charts = [_PlacedChart(ruler, chart, self.width, wide=part.wide_labels) for chart in part.charts]
        rows = range(0, number, self.columns)
        self.tops = [max(chart.height for chart in self.charts[row : row + self.columns]) for row in rows]
        self.height = sum(self.tops)

    def draw(self, sheet: Sheet, top: float) -> None:
        for place, chart in enumerate(self.charts):
            row, column = divmod(place, self.columns)
            chart.draw(sheet, EDGE + column * (self.width + GAP), top + sum(self.tops[:row]))


class _PlacedChart:
    """A chart of a known width: title, note, and rows between their labels and values."""

    def __init__(self, ruler: Ruler, chart: Chart, width: float, *, wide: bool) -> None:
        self.chart, self.width = chart, width
        self.before, self.behind = (_PLAN_LABELS, _VALUES) if wide else (_STAGE_LABELS, 0.5)
        self.title = ruler.fitted(chart.title, width, 9.0, bold=True) if chart.title else ""
        self.note = ruler.lines(chart.note, width, 8.5) if chart.note else []
        self.labels = [ruler.fitted(row.label, self.before - 0.1, 8.0) for row in chart.rows]
        self.drawn = min(0.24 * len(chart.rows), max(_TALLEST, 0.035 * len(chart.rows)))
        self.height = LINE * (bool(self.title) + len(self.note)) + self.drawn + 0.42

    def draw(self, sheet: Sheet, left: float, top: float) -> None:
        """From its upper left corner."""
        if self.title:
            sheet.words(left, top, self.title, fontweight="bold")
            top += LINE
        for line in self.note:
            sheet.words(left, top, line, size=8.5, colour=_FAINT)
            top += LINE
        chart, each = self.chart, self.drawn / len(self.chart.rows)
        start, end = left + self.before, left + self.width - self.behind
        axes = sheet.panel(start, top, end - start, self.drawn)
        axes.set_xlim(0.0, 1.0)
        axes.set_ylim(len(chart.rows), 0.0)
        _draw_rows(axes, chart)
        every, last = math.ceil(0.15 / each), len(chart.rows) - 1
        for place in {*(place for place in range(0, last, every) if last - place >= every), last}:
            middle = top + (place + 0.5) * each
            sheet.words(start - 0.08, middle, self.labels[place], size=8.0, ha="right", va="center")
            sheet.words(end + 0.08, middle, chart.rows[place].value, size=8.0, va="center")
        self._scale(sheet, axes, start, end, top + self.drawn + 0.03)

    def _scale(self, sheet: Sheet, axes: Any, start: float, end: float, top: float) -> None:
        if self.chart.mark is None:
            sheet.words(start, top, "0", size=7.5, colour=_FAINT)
            sheet.words(end, top, self.chart.scale, size=7.5, colour=_FAINT, ha="right")
            return
        at, words = self.chart.mark
        axes.axvline(at, color=_BAD, linewidth=1.2)
        side = "right" if at > 0.3 else "left"
        sheet.words(start + at * (end - start), top, words, size=7.5, colour=_FAINT, ha=side)


def _draw_rows(axes: Any, chart: Chart) -> None:
    from matplotlib.collections import PolyCollection

    thick = 0.8 if len(chart.rows) <= _APART else 1.0
    for kind in chart.kinds:  # idle is drawn first, since what is done lies over it
        corners = [
            [(piece.start, low), (piece.end, low), (piece.end, low + thick), (piece.start, low + thick)]
            for place, row in enumerate(chart.rows)
            for piece in row.pieces
            if piece.kind == kind
            for low in (place + (1.0 - thick) / 2,)
        ]
        order = 1 if kind == "idle" else 2
        axes.add_collection(PolyCollection(corners, facecolors=COLOURS[kind][0], linewidths=0.0, zorder=order))


class _Table(Block):
    """Facts as lines and plans as columns, as tall as its longest words need."""

    def __init__(self, ruler: Ruler, names: Sequence[str], rows: Sequence[Fact], first: int) -> None:
        self.first, self.count = first, len(names)
        self.column = (WIDTH - 2 * EDGE - _NAME_COLUMN) / max(self.count, 3)
        room = self.column - 0.15
        self.names = [ruler.lines(name, room, 8.5, bold=True) for name in names]
        self.rows = [
            (fact, ruler.lines(fact.name, _NAME_COLUMN - 0.15, 8.5),
             [ruler.lines(cell, room, 8.5, bold=True, most=4) for cell in fact.cells[first : first + self.count]])
            for fact in rows
        ]  # fmt: skip
        self.lines = [max(len(name), *map(len, cells)) for _, name, cells in self.rows]
        self.head = max(map(len, self.names)) * LINE + 0.08
        self.height = self.head + sum(lines * LINE + 0.05 for lines in self.lines) + 0.15

    def draw(self, sheet: Sheet, top: float) -> None:
        for place, name in enumerate(self.names):
            self._cell(sheet, place, top, name, fontweight="bold")
        top += self.head
        for (fact, name, cells), lines in zip(self.rows, self.lines, strict=True):
            rule = sheet.panel(EDGE, top - 0.035, _NAME_COLUMN + self.count * self.column, 0.01)
            rule.add_patch(rectangle(_LINES))
            sheet.words(EDGE, top, "\n".join(name), size=8.5, colour=_FAINT)
            for place, cell in enumerate(cells):
                best = self.first + place in fact.best
                lost = fact.name == "fits" and cell != ["yes"]
                colour = _GOOD if best else _BAD if lost else INK
                self._cell(sheet, place, top, cell, colour=colour, fontweight="bold" if best else "normal")
            top += lines * LINE + 0.05

    def _cell(self, sheet: Sheet, place: int, top: float, lines: Sequence[str], **more: Any) -> None:
        sheet.words(EDGE + _NAME_COLUMN + place * self.column, top, "\n".join(lines), size=8.5, **more)


def _blocks(entries: Sequence[Compared]) -> list[Block]:
    found, ruler = verdict(entries), Ruler()
    blocks: list[Block] = [Words(ruler, [found.answer], size=13.0, bold=True), Words(ruler, found.notes)]
    for part in sections(entries, _PIECES):
        blocks += [Title(ruler, part.title), _Legend(ruler, part.legend), _Charts(ruler, part)]
    rows = facts(entries)
    several = len(entries) > 1
    kept = [fact for fact in rows if fact.differs or not several or fact.group not in ("question", "layout")]
    blocks.append(Title(ruler, "Differences" if several else "Facts"))
    same = common_text(rows) if several else ""
    blocks += [Words(ruler, [f"The same in all: {same}."], size=8.5, colour=_FAINT)] if same else []
    for first in range(0, len(entries), _COLUMNS):
        names = [entry.short for entry in entries[first : first + _COLUMNS]]
        blocks.append(_Table(ruler, names, kept, first))
    return blocks
