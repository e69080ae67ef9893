"""Standard streams that may be closed, full, gone or of another encoding: one message, never a traceback.

And the bar that a search shows on one of them.
"""

from __future__ import annotations

import codecs
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol

from planner.errors import PlannerError

_PLAINER = {"×": "x", "─": "-", "–": "-", "…": "...", "µ": "u", "\u03bc": "u", "·": "."}


class OutputError(Exception):
    """Standard output cannot be written."""

    def __init__(self, reason: OSError) -> None:
        self.reason = reason
        super().__init__(str(reason))

    def told(self) -> PlannerError:
        """The same for the user."""
        remedy = "free space there, or send the output elsewhere"
        reason = self.reason.strerror or str(self.reason)
        return PlannerError("standard output cannot be written", value=reason, remedy=remedy, key="stdout")


class Output:
    """Standard output, whose failures are told apart from those of any other file."""

    def __init__(self, stream: Any) -> None:
        if stream is None:  # closed before we started
            raise OutputError(OSError("it is closed"))
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> Any:
        """As the stream itself, but failing with an `OutputError`."""
        return self._checked(self._stream.write, text)

    def flush(self) -> None:
        """As the stream itself, but failing with an `OutputError`."""
        self._checked(self._stream.flush)

    def _checked(self, call: Callable[..., Any], *given: Any) -> Any:
        try:
            return call(*given)
        except OSError as error:
            raise OutputError(error) from None


def prepare_streams() -> None:
    """Characters that a stream's encoding lacks are written in a plainer way instead of failing."""
    codecs.register_error("plainer", _plainer)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plainer")


def _plainer(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(_PLAINER.get(character, "?") for character in lacking), error.end


def tell(text: str) -> None:
    """A word on stderr; where that is closed or full, nobody is there to read it."""
    if sys.__stderr__ is None:
        return
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream: IO[str] | None) -> None:
    """Send what a stream still holds nowhere, or the interpreter fails on it when it ends."""
    with contextlib.suppress(OSError, ValueError):
        if stream is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Progressed(Protocol):
    """How far a search has come."""

    @property
    def explored(self) -> int:
        """Candidates that were looked at."""

    @property
    def candidates(self) -> int:
        """All of them."""

    @property
    def best_seconds(self) -> float:
        """Infinite before there is one."""

    @property
    def bound_seconds(self) -> float:
        """What no candidate is below."""


@contextlib.contextmanager
def search_bar(*, quiet: bool) -> Iterator[Callable[[Progressed], None]]:
    """A bar on stderr while a search runs, where a person looks at it; what it yields hears of the progress."""
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("searching"),
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def hear(found: Progressed) -> None:
            bar.update(task, completed=found.explored, total=found.candidates, description=progress_text(found))

        yield hear


def progress_text(found: Progressed) -> str:
    """`890 of 6,609, best 14.2 s, bound 13.9 s, gap 1.5 %`."""
    told = f"{found.explored:,} of {found.candidates:,}"
    if not math.isfinite(found.best_seconds):
        return f"{told}, none that fits yet"
    gap = 1.0 - found.bound_seconds / found.best_seconds if found.best_seconds else 0.0
    best, bound = (f"{seconds:.4g} s" for seconds in (found.best_seconds, found.bound_seconds))
    return f"{told}, best {best}, bound {bound}, gap {100 * max(0.0, gap):.2g} %"
