"""What a run tells while it goes on: JSON lines, a bar on a terminal, and at the end what was measured."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from planner.errors import PlannerError
from planner.spec.files import write_text
from planner.spec.plan import Plan
from planner.units import in_binary_bytes, in_decimal

_LINE_SECONDS = 5.0  # between lines where there is no terminal


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMetrics:
    """One optimizer step."""

    step: int  # from 1
    loss: float
    learning_rate: float
    gradient_norm: float | None  # before clipping; none where it was not asked for
    seconds: float
    tokens_per_second: float
    mfu: float | None  # of the peak of the devices that the plan was made for
    predicted_seconds: float | None
    allocated_bytes: float  # highest so far on rank 0
    reserved_bytes: float


class Reader(Protocol):
    """Hears of every step."""

    def step(self, metrics: StepMetrics) -> None: ...

    def say(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """What a plan says of its own step; nothing where a person changed it since."""

    seconds: float | None
    mfu: float | None

    @classmethod
    def of(cls, plan: Plan) -> Predicted:
        """Of the figures in the plan's file."""
        if plan.edited:
            return cls(seconds=None, mfu=None)
        return cls(seconds=plan.estimate.step_seconds, mfu=plan.estimate.mfu)

    def mfu_at(self, seconds: float) -> float | None:
        """The model's FLOPs are the same, so their share of the peak goes with the speed."""
        if self.seconds is None or self.mfu is None or not seconds:
            return None
        return self.mfu * self.seconds / seconds


class Log:
    """JSON lines, one for each step. Steps that a resumed run does again are taken out first."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = _lines_before(path, first_step)
        write_text(path, "".join(kept))
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def step(self, metrics: StepMetrics) -> None:
        """A line of its own, on the disk before the next step."""
        try:
            self._file.write(json.dumps(asdict(metrics)) + "\n")
            self._file.flush()
        except OSError as error:
            raise PlannerError(
                "the log can be written",
                value=f"{self._file.name}: {error.strerror}",
                remedy="free space there, or give --log elsewhere",
                key="log",
            ) from None

    def say(self, text: str) -> None:
        """Only steps are logged."""


def _lines_before(path: Path, step: int) -> list[str]:
    if not step or not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line)
    return kept


class Lines:
    """Words on stderr, not more often than a person reads."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._told = float("-inf")

    def step(self, metrics: StepMetrics) -> None:
        """The first and the last step, and one now and then."""
        if metrics.step == self._steps or time.monotonic() - self._told >= _LINE_SECONDS:
            self._told = time.monotonic()
            self.say(f"step {metrics.step} of {self._steps}  {told(metrics)}")

    def say(self, text: str) -> None:
        """A line."""
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


class Bar:
    """The same on a terminal."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def step(self, metrics: StepMetrics) -> None:
        """Moves the bar on."""
        self._bar.update(self._task, completed=metrics.step, description=told(metrics))

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)


class Silence:
    """For every rank but the first, and where nobody wants to hear."""

    def step(self, metrics: StepMetrics) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


@contextlib.contextmanager
def watched(steps: int, first: int, *, quiet: bool) -> Iterator[Reader]:
    """Who tells a person of the steps."""
    if quiet:
        yield Silence()
        return
    if sys.stderr is None or not sys.stderr.isatty():
        yield Lines(steps)
        return
    from rich.console import Console

    with bar_on(Console(stderr=True, highlight=False)) as bar:
        yield Bar(bar, bar.add_task("", total=steps, completed=first))


def bar_on(console: Any) -> Any:
    """Steps done, when the last one will be, and words that go on below where the terminal is narrow."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    words = TextColumn("{task.description}", table_column=Column(ratio=1))
    return Progress(MofNCompleteColumn(), BarColumn(bar_width=16), TimeRemainingColumn(), words, console=console)


def told(metrics: StepMetrics) -> str:
    """`loss 3.123  1.20 s (predicted 1.10 s)  12.3 k tokens/s  MFU 41.2 %  10.2 GiB`."""
    words = [f"loss {metrics.loss:.4f}", f"{metrics.seconds:.3g} s"]
    if metrics.predicted_seconds is not None:
        words[-1] += f" (predicted {metrics.predicted_seconds:.3g} s)"
    words.append(in_decimal(metrics.tokens_per_second, "tokens/s"))
    if metrics.mfu is not None:
        words.append(f"MFU {100 * metrics.mfu:.3g} %")
    return "  ".join([*words, in_binary_bytes(metrics.allocated_bytes)])


def peak_bytes(device: torch.device) -> tuple[float, float]:
    """The highest that tensors and allocator stood at; of a CPU what the process took, twice."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)), float(torch.cuda.max_memory_reserved(device))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
    return resident, resident
