"""A picture set out by hand: places in inches from its upper left corner, and words measured before they stand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from planner.report.compare_verdict import shortened, unbroken

DPI = 110
WIDTH = 13.0  # inches, as all below
EDGE = 0.35
LINE = 0.19  # of ordinary words
GAP = 0.3
INK = "#1b1d22"
_SAFETY = 1.01  # letters snap to pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A figure whose places are inches from its upper left corner."""

    figure: Any
    height: float

    def words(
        self, left: float, top: float, text: str, *, size: float = 9.0, colour: str = INK, **more: Any
    ) -> None:
        """Text whose upper left corner is there."""
        place = (left / WIDTH, 1.0 - top / self.height)
        more = {"ha": "left", "va": "top", "parse_math": False} | more
        self.figure.text(*place, text, fontsize=size, color=colour, **more)

    def panel(self, left: float, top: float, width: float, height: float) -> Any:
        """Axes without frame or ticks."""
        axes = self.figure.add_axes(
            (left / WIDTH, 1.0 - (top + height) / self.height, width / WIDTH, height / self.height)
        )
        axes.set_axis_off()
        return axes


class Ruler:
    """How wide words are."""

    def __init__(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        canvas: Any = FigureCanvasAgg(Figure(figsize=(1.0, 1.0), dpi=DPI))
        self.renderer = canvas.get_renderer()

    def width(self, text: str, size: float, *, bold: bool = False) -> float:
        """Inches that a line takes."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight="bold" if bold else "normal")
        pixels, _, _ = self.renderer.get_text_width_height_descent(text, font, ismath=False)
        return _SAFETY * float(pixels) / DPI

    def lines(self, text: str, room: float, size: float, *, bold: bool = False, most: int = 0) -> list[str]:
        """Text between two edges, broken between words; a word that is too long anywhere."""
        found = [""]
        for word in text.split(" "):
            longer = f"{found[-1]} {word}" if found[-1] else word
            if self.width(longer, size, bold=bold) <= room:
                found[-1] = longer
                continue
            rest = word
            found += [""] if found[-1] else []
            while self.width(rest, size, bold=bold) > room and len(rest) > 1:
                cut = self._fitting(rest, room, size, bold=bold)
                found[-1], rest = rest[:cut], rest[cut:]
                found.append("")
            found[-1] = rest
        if most and len(found) > most:
            found = [*found[: most - 1], f"{found[most - 1][:-1]}…"]
        return found

    def fitted(self, name: str, room: float, size: float, *, bold: bool = False) -> str:
        """A name in one line, its middle left out where it is too long."""
        for longest in range(len(name), 5, -1):
            short = shortened(name, longest)
            if self.width(short, size, bold=bold) <= room:
                return short
        return shortened(name, 5)

    def _fitting(self, text: str, room: float, size: float, *, bold: bool) -> int:
        """How many letters have room; at least one."""
        low, high = 1, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.width(text[:middle], size, bold=bold) <= room else (low, middle - 1)
        return low


class Block(ABC):
    """Something as wide as the picture, of a known height."""

    height = 0.0

    @abstractmethod
    def draw(self, sheet: Sheet, top: float) -> None:
        """Set it out from there."""


class Words(Block):
    """Lines of words, wrapped."""

    def __init__(
        self, ruler: Ruler, lines: Iterable[str], *, size: float = 9.0, colour: str = INK, bold: bool = False
    ) -> None:
        room = WIDTH - 2 * EDGE
        self.lines = [part for line in lines for part in ruler.lines(unbroken(line), room, size, bold=bold)]
        self.size, self.colour, self.weight = size, colour, "bold" if bold else "normal"
        self.step = LINE * size / 9.0
        self.height = self.step * len(self.lines) + 0.06

    def draw(self, sheet: Sheet, top: float) -> None:
        for place, line in enumerate(self.lines):
            sheet.words(EDGE, top + place * self.step, line, size=self.size, colour=self.colour,
                        fontweight=self.weight)  # fmt: skip


class Title(Words):
    """A title with space above."""

    def __init__(self, ruler: Ruler, title: str) -> None:
        super().__init__(ruler, [title], size=11.0, bold=True)
        self.height += GAP

    def draw(self, sheet: Sheet, top: float) -> None:
        super().draw(sheet, top + GAP)


def rectangle(colour: str) -> Any:
    """A panel filled with a colour."""
    from matplotlib.patches import Rectangle

    return Rectangle((0.0, 0.0), 1.0, 1.0, facecolor=colour, linewidth=0.0)
