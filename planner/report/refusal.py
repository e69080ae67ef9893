"""That nothing fits, on a terminal: the limit, what comes closest, and what would fit."""

from __future__ import annotations

import textwrap
from typing import IO

from rich.text import Text

from planner.report.terminal import console
from planner.spec.misfit import Misfit


def show_refusal(misfit: Misfit, stream: IO[str] | None = None) -> None:
    """The lines of a misfit, wrapped with their further lines set in, the first in red."""
    out = console(stream)
    for place, line in enumerate(misfit.lines):
        indent = " " * (len(line) - len(line.lstrip()) + (2 if place else 0))
        for part in textwrap.wrap(line, out.width, subsequent_indent=indent + "  ") or [""]:
            out.print(Text(part, style="bold red" if place == 0 else ""))
