"""That nothing fits, as an answer: the limit that binds, by how much, and the nearest changes that were solved.

    error[memory]: no layout fits 80 GiB on 8 GPUs
      closest: tp8 zero3 sp, full recompute, needs 153 GiB, up to 183 (optimizer 98.6 GiB)
      fix: --gpus 32 (fits with up to 71.2 GiB, 14.1 s/step), or allow recompute (…)

Every change was solved again: it says what the best layout with it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from planner.spec.codec import Bytes, Count, Degree, Seconds, encode
from planner.spec.estimate import Memory
from planner.spec.strategy import Strategy
from planner.units import in_binary_bytes

Limit = Literal["memory", "rules", "deadline", "time"]

_MOST_PARTS = 2  # of memory that a line names
_PARTS = 0.1  # of the memory, from which on a part is named


@dataclass(frozen=True, slots=True, kw_only=True)
class Closest:
    """The layout of least memory, on the most GPUs that were tried: stages even, every layer recomputed alike."""

    strategy: Strategy
    stage: Count  # the fullest one
    memory: Memory  # of its worst GPU
    high_bytes: Bytes  # upper end of that memory's interval, which has to fit
    capacity_bytes: Bytes  # what it may take of a device

    DERIVED: ClassVar[tuple[str, ...]] = ("missing_bytes",)

    @property
    def missing_bytes(self) -> float:
        """By how much it is too large; 0 where it fits."""
        return max(0.0, self.high_bytes - self.capacity_bytes)

    @property
    def text(self) -> str:
        """`tp8 zero3, full recompute, needs 153 GiB on stage 0, up to 183 GiB (optimizer 98.6 GiB)`."""
        where = f" on stage {self.stage}" if self.strategy.pp > 1 else ""
        parts = sorted(self.memory.parts.items(), key=lambda part: -part[1])
        named = [
            f"{key.removesuffix('_bytes').replace('_', ' ')} {in_binary_bytes(size)}"
            for key, size in parts[:_MOST_PARTS]
            if size > _PARTS * self.memory.device_bytes
        ]
        again = f"{self.strategy.recompute} recompute" if self.strategy.recompute != "none" else "no recompute"
        inside = f" ({', '.join(named)})" if named else ""
        needs = f"{in_binary_bytes(self.memory.device_bytes)}{where}, up to {in_binary_bytes(self.high_bytes)}"
        return f"{self.strategy.label}, {again}, needs {needs}{inside}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change after which something fits, and the best layout then."""

    flags: str  # such as `--gpus 32`, or words where no single flag says it
    strategy: Strategy
    gpus: Degree
    step_seconds: Seconds
    memory_high_bytes: Bytes  # upper end of the interval, which fits

    @property
    def text(self) -> str:
        """`--gpus 32 (fits with up to 71.2 GiB, 14.1 s/step)`."""
        return f"{self.flags} (fits with up to {in_binary_bytes(self.memory_high_bytes)}, {self.pace})"

    @property
    def pace(self) -> str:
        """`14.1 s/step`."""
        return f"{seconds_text(self.step_seconds)}/step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Misfit:
    """Why no layout keeps to what is asked, and what would."""

    limit: Limit
    gpus: tuple[Degree, ...]  # numbers of GPUs that were tried
    candidates: Count
    illegal: dict[str, Count] = field(default_factory=dict)  # by rule
    broken: str = ""  # the rule in words, of a plain layout
    capacity_bytes: Bytes  # what a layout may take of a device
    closest: Closest | None = None  # of memory
    deadline_seconds: Seconds = 0.0
    best_seconds: Seconds = 0.0  # the shortest step without the deadline
    changes: tuple[Change, ...] = ()
    failed: tuple[str, ...] = ()  # changes that were solved and do not help
    untried: tuple[str, ...] = ()  # for which no time was left

    DERIVED: ClassVar[tuple[str, ...]] = ("rule", "remedy")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data: dict[str, Any] = encode(self, omit_defaults=True)
        return data

    @property
    def key(self) -> str:
        """What an error names in its brackets."""
        return self.limit

    @property
    def rule(self) -> str:
        """What no layout keeps to."""
        where = _gpus_text(self.gpus)
        if self.limit == "memory":
            return f"no layout fits {in_binary_bytes(self.capacity_bytes)} on {where}"
        if self.limit == "deadline":
            return f"no layout on {where} has a step of at most {seconds_text(self.deadline_seconds)}"
        if self.limit == "rules":
            return f"none of {self.candidates:,} layouts on {where} can run"
        return f"the time was up before a layout on {where} was found that fits"

    @property
    def value(self) -> str:
        """By how much it fails."""
        if self.limit == "deadline":
            over = self.best_seconds / self.deadline_seconds - 1.0 if self.deadline_seconds else 0.0
            return f"{seconds_text(self.best_seconds)} at best, {100 * over:.3g} % too long"
        if self.limit == "rules":
            counts = sorted(self.illegal.items(), key=lambda item: (-item[1], item[0]))
            told = ", ".join(f"{count:,} {rule}" for rule, count in counts)
            return told + (f"; {self.broken}" if self.broken else "")
        if self.closest is None:
            return ""
        short = self.closest.missing_bytes
        over_text = f"; {in_binary_bytes(short)} too much" if short else ""
        return f"{self.closest.text}{over_text}"

    @property
    def remedy(self) -> str:
        """The changes, the nearest first."""
        if self.changes:
            return ", or ".join(change.text for change in self.changes)
        if self.untried:
            return f"unknown: nothing that was tried fits ({', '.join(self.failed) or 'nothing was'})"
        return f"none found: {', '.join(self.failed) or 'nothing'} tried, and nothing fits"

    @property
    def lines(self) -> tuple[str, ...]:
        """The answer as a terminal has it: the limit, what comes closest, what would fit."""
        name = "closest" if self.limit in ("memory", "time") else "got"
        found = [f"error[{self.key}]: {self.rule}"]
        found += [f"  {name}: {self.value}"] if self.value else []
        leads = ["fix", *[" or"] * len(self.changes)]
        found += [f"  {lead}: {change.text}" for lead, change in zip(leads, self.changes, strict=False)]
        found += [] if self.changes else [f"  fix: {self.remedy}"]
        found += [f"  does not help: {', '.join(self.failed)}"] if self.failed and self.changes else []
        found += [f"  not tried: {', '.join(self.untried)}"] if self.untried else []
        return tuple(found)


def seconds_text(seconds: float) -> str:
    """`14.1 s`, `8.77 s`, `35.0 ms`: three digits."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= scale:
            count = seconds / scale
            decimals = 2 if count < 9.995 else 1 if count < 99.95 else 0
            return f"{count:,.{decimals}f} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _gpus_text(gpus: tuple[int, ...]) -> str:
    if len(gpus) == 1:
        return f"{gpus[0]:,} GPUs" if gpus[0] > 1 else "one GPU"
    return f"{min(gpus):,} to {max(gpus):,} GPUs"
