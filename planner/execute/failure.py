"""What went wrong, and where: a record of what a rank does that outlives it, and reports of ranks that fail."""

from __future__ import annotations

import json
import mmap
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn

from planner.errors import EXIT_ANSWER_IS_NO, PlannerError
from planner.execute.phases import StepPhase, current_phase
from planner.execute.roll_call import RollCall
from planner.execute.where import Where
from planner.units import in_binary_bytes

EXIT_TERMINATED = 143  # as a shell says of SIGTERM: the run was asked to end, and can be resumed
RECORDS = "TP_PLAN_RUN_RECORDS"  # environment: the folder where ranks leave records for who started them

Kind = Literal["input", "error", "memory", "hang", "peer"]

_RECORD_BYTES = 512
LEAST_ENDING_SECONDS = 30  # for a rank to end when it is told to; a checkpoint that it writes may take longer
_STANDING_SECONDS = 5.0  # of those, in which a step may stand still, and at least three steps
_LOST_PEER = re.compile(
    r"gloo/|Connection (closed|reset)|[Tt]imed out|timeout|NCCL|ProcessGroup|Broken pipe|TCPStore|peer"
)
_SOURCE_PLACE = re.compile(r"^\[\S+:\d+\] ")  # of gloo's own files
_NO_MEMORY = re.compile(r"out of memory|[Cc]annot allocate|can't allocate|DefaultCPUAllocator|bad_alloc")


class RunFailed(PlannerError):  # noqa: N818 - as the other answers that are no
    """A run that began and could not go on."""

    exit_code = EXIT_ANSWER_IS_NO


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rank tells when it fails."""

    where: Where
    kind: Kind
    seconds: float  # of the wall clock
    rule: str
    value: str
    remedy: str
    key: str
    exit_code: int
    traceback: str = ""

    def error(self) -> PlannerError:
        """The same as an error."""
        found = PlannerError(self.rule, value=self.value or None, remedy=self.remedy, key=self.key)
        found.exit_code = self.exit_code
        return found


class Record:
    """What this rank does now, in a mapped file: readable when the rank was killed."""

    def __init__(self, rank: int, stage: int = 0) -> None:
        self.rank, self.stage = rank, stage
        self.step, self.module, self.events = -1, "", 0
        self.phase: StepPhase = "setup"
        self.changed = time.monotonic()
        self.roll_call: RollCall | None = None  # where ranks are on several hosts
        self._folder = Path(os.environ[RECORDS]) if RECORDS in os.environ else None
        self._map: mmap.mmap | None = None
        if self._folder is not None:
            path = self._folder / f"rank-{rank}.now"
            path.write_bytes(b"\0" * _RECORD_BYTES)
            with path.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), _RECORD_BYTES)
        self._write()

    @property
    def where(self) -> Where:
        """As a value."""
        phase = current_phase()
        phase = self.phase if phase == "setup" else phase  # an error that left the phase, left it as it was
        return Where(rank=self.rank, stage=self.stage, pid=os.getpid(), step=self.step, phase=phase,
                     module=self.module, events=self.events)  # fmt: skip

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step, self.module, self.phase = step, "", "setup"
        self._write()

    def follow(self, module: nn.Module, closed: Collection[nn.Module] = ()) -> None:
        """Keep the module whose forward runs. Hooks only look: neither values nor gradients change.

        Within `closed` modules, which a compiler sees as a whole, none are followed.
        """
        inside = {part for each in closed for part in each.modules() if part is not each}
        for path, part in module.named_modules():
            if part in inside:
                continue
            parent = path.rpartition(".")[0]
            part.register_forward_pre_hook(lambda _, __, path=path: self._enter(path))
            part.register_forward_hook(lambda _, __, ___, path=parent: self._enter(path))

    def report(self, error: BaseException) -> Report:
        """Leave a report of what ends this rank."""
        found = self.blamed(_report(self.where, error))
        self.leave(found)
        return found

    def blamed(self, report: Report) -> Report:
        """The report of a rank that misses others, naming those that are lost where that is known."""
        lost = self.roll_call.lost() if self.roll_call is not None and report.kind == "peer" else ()
        if not lost:
            return report
        names = ", ".join(str(word.where.rank) for word in lost)
        ranks, them = (f"ranks {names} are", "them") if len(lost) > 1 else (f"rank {names} is", "it")
        first = lost[0]
        return replace(
            report,
            rule=f"{ranks} gone, and the run with {them}",
            value=f"{first.where.told}, on {first.host}",
            remedy=f"see what ended {them} there, then go on with --resume",
            key=f"rank.{first.where.rank}",
        )

    def leave(self, report: Report) -> None:
        """Write a report where whoever started the ranks reads it."""
        if self._folder is not None:
            path = self._folder / f"rank-{self.rank}.json"
            path.with_suffix(".part").write_text(json.dumps(asdict(report)))
            path.with_suffix(".part").rename(path)

    def _enter(self, path: str) -> None:
        self.module, self.phase = path, current_phase()
        self.events += 1
        self._write()

    def _write(self) -> None:
        self.changed = time.monotonic()
        if self._map is not None:
            # twice for each module of each microbatch: no more than a line
            told = self.where.line.encode()[: _RECORD_BYTES - 1]
            self._map[: len(told) + 1] = told + b"\0"


def read_where(folder: Path, rank: int) -> Where | None:
    """What a rank did last, if it came to tell."""
    try:
        return Where.parsed((folder / f"rank-{rank}.now").read_bytes().split(b"\0")[0].decode(errors="replace"))
    except (OSError, ValueError):
        return None


def read_report(folder: Path, rank: int) -> Report | None:
    """What a rank told when it failed."""
    try:
        told: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
    except (OSError, ValueError):
        return None
    return Report(**{**told, "where": Where(**told["where"])})


class Watch(threading.Thread):
    """Ends a rank that cannot end itself: it hangs, its launcher is gone, or it waits for others in vain."""

    def __init__(self, record: Record, longest_seconds: float) -> None:
        super().__init__(name="watch", daemon=True)
        self._record = record
        self._longest = longest_seconds
        self._parent = os.getppid()
        self._main = threading.main_thread().ident
        self._asked = 0.0  # when this rank was told to end
        self.armed = False  # only in a step: loading and compiling take their time
        self.writes = False  # a checkpoint: whoever started this rank knows how long that may take
        self.patience = _STANDING_SECONDS  # with a step once this rank was told to end
        self._signals, self._signalled = socket.socketpair()

    @property
    def asked_to_end(self) -> bool:
        """Whether SIGTERM or SIGINT came."""
        return self._asked > 0

    def listen(self) -> None:
        """Hear of SIGTERM and SIGINT instead of dying of them, also while the main thread waits for others."""
        self._signalled.setblocking(False)
        signal.set_wakeup_fd(self._signalled.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def run(self) -> None:
        """Look twice a second, and whenever a signal comes."""
        while True:
            heard, _, _ = select.select([self._signals], [], [], 0.5)
            if heard and set(self._signals.recv(64)) & {signal.SIGTERM, signal.SIGINT}:
                self._asked = self._asked or time.monotonic()
            if os.getppid() != self._parent:
                self._end("the launcher of this rank is gone", "start the run again with --resume")
            if broken := self.broken(time.monotonic()):
                self._end(*broken)

    def broken(self, now: float) -> tuple[str, str] | None:
        """The rule that this rank breaks by standing where it does, and its remedy."""
        still = now - max(self._record.changed, self._asked)
        patience = self.patience if self.armed else max(LEAST_ENDING_SECONDS, self.patience)
        if self.asked_to_end and not self.writes and still > patience:
            return "a rank that is asked to end does so", "see what it waits for, or does"
        if self.armed and now - self._record.changed > self._longest:
            return f"a step goes on within {self._longest:g} s", "see what it does, or give a longer --timeout"
        return None

    def _end(self, rule: str, remedy: str) -> None:
        frame = sys._current_frames().get(self._main or 0)
        place, waits = _place(frame)
        where = self._record.where
        report = Report(where=where, kind="peer" if waits else "hang", seconds=time.time(), rule=rule,
                        value=f"{where.told}, at {place}", remedy=remedy, key=f"rank.{where.rank}",
                        exit_code=EXIT_ANSWER_IS_NO,
                        traceback="".join(traceback.format_stack(frame)))  # fmt: skip
        report = self._record.blamed(report)
        self._record.leave(report)
        if RECORDS not in os.environ:
            print(report.error(), file=sys.stderr, flush=True)
        os._exit(EXIT_ANSWER_IS_NO)


def _place(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread stands, and whether it waits for other ranks there."""
    if frame is None:
        return "an unknown place", False
    waits = "torch/distributed" in frame.f_code.co_filename.replace(os.sep, "/")
    shown = frame
    while waits and shown.f_back is not None and "torch" in shown.f_code.co_filename:
        shown = shown.f_back
    return f"{Path(shown.f_code.co_filename).name}:{shown.f_lineno}", waits


def _report(where: Where, error: BaseException) -> Report:
    compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    while error.__cause__ is not None and not isinstance(error, PlannerError):
        error = error.__cause__  # torch's pipelines wrap what a stage raises
    told = str(error).strip().splitlines()
    value = f"{type(error).__name__}: {told[0]}" if told else type(error).__name__
    kind: Kind = "error"
    key, code = f"rank.{where.rank}", EXIT_ANSWER_IS_NO
    rule, remedy = "a rank failed, and the run with it", "run again with -v for its traceback, then with --resume"
    if isinstance(error, PlannerError):
        kind, key, code = "input", error.key, error.exit_code
        rule, value, remedy = error.rule, error.value or "", error.remedy
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _NO_MEMORY.search(str(error)):
        kind = "memory"
        rule, value = "a rank ran out of memory", f"{where.told}: {value}{_peak()}"
        remedy = "plan with --memory-margin, a smaller --microbatch or --zero 3; tp-plan explain shows its memory"
    elif compiler:
        rule, value = "torch.compile makes kernels of each block", f"{where.told}: {value}"
        remedy = "run without --compile, or see with -v what it could not compile"
    elif isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)):
        kind = "peer"
        rule, value = "a rank lost the others", f"{where.told}: {_SOURCE_PLACE.sub('', told[0])}"
        remedy = "see what ended the other rank, then go on with --resume"
    else:
        value = f"{where.told}: {value}"
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Report(where=where, kind=kind, seconds=time.time(), rule=rule, value=value, remedy=remedy, key=key,
                  exit_code=code, traceback=trace)  # fmt: skip


def _peak() -> str:
    if not torch.cuda.is_available():
        return ""
    return f", {in_binary_bytes(torch.cuda.max_memory_allocated())} were allocated"
