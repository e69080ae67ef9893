"""What checking a plan before it runs found: what its executor does beside what it says, rank by rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from planner.spec.codec import Bytes, Count, Degree, Range, encode
from planner.spec.paths import Span
from planner.spec.plan import CollectiveAxis, CollectiveKind, ExpectedCollective, Phase
from planner.spec.strategy import Strategy
from planner.units import in_binary_bytes

CollectiveKey = tuple[CollectiveAxis, Phase, CollectiveKind]


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCheck:
    """One kind of collective in a steady step: what the plan lists, and what the executor issues."""

    axis: CollectiveAxis
    phase: Phase
    kind: CollectiveKind
    planned_count: Count
    planned_bytes: Count
    found_count: Count
    found_bytes: Count

    @property
    def agrees(self) -> bool:
        """Whether both are equal."""
        return (self.planned_count, self.planned_bytes) == (self.found_count, self.found_bytes)

    def __str__(self) -> str:
        planned, found = (
            f"{count} of {size:,} bytes" if count else "none"
            for count, size in (
                (self.planned_count, self.planned_bytes),
                (self.found_count, self.found_bytes),
            )
        )
        what = f"{self.axis} {self.kind} in {self.phase}"
        return f"{what}: the plan lists {planned}, the executor issues {found}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCheck:
    """The peak of a rank: what its tensors take in the dry run, on top the plan's own reserve and context."""

    planned_bytes: Bytes  # as the device sees it
    found_bytes: Bytes
    low_bytes: Bytes  # the plan's interval for this rank
    high_bytes: Bytes
    planned_tensor_bytes: Bytes
    found_tensor_bytes: Bytes
    in_flight: Count  # microbatches that the rank holds at most, over all its virtual stages

    @property
    def agrees(self) -> bool:
        """Whether the peak is within the interval."""
        return self.low_bytes <= self.found_bytes <= self.high_bytes

    def __str__(self) -> str:
        low, high = in_binary_bytes(self.low_bytes), in_binary_bytes(self.high_bytes)
        planned, found = in_binary_bytes(self.planned_bytes), in_binary_bytes(self.found_bytes)
        return f"peak memory: the plan says {planned} ({low} to {high}), the dry run takes {found}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCheck:
    """A pipeline rank, dry-run."""

    stage: Count
    same_as: Count  # the rank whose modules are equal and were run: often itself
    layers: tuple[Span, ...]  # of each of its virtual stages
    collectives: tuple[CollectiveCheck, ...]
    memory: MemoryCheck

    @property
    def differences(self) -> tuple[str, ...]:
        """What does not agree, in words."""
        checks: tuple[CollectiveCheck | MemoryCheck, ...] = (*self.collectives, self.memory)
        return tuple(f"stage {self.stage}: {check}" for check in checks if not check.agrees)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueCheck:
    """One value of a step on several processes beside the same on one."""

    what: str  # `loss`, `gradient of PATH`, `AdamW's step of PATH`
    error: Annotated[float, Range(0.0, math.inf)]  # largest difference over largest value


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """A small copy of the plan on local processes: how far its step is from that of one process."""

    processes: Degree
    strategy: Strategy  # of the small copy
    layers: Count
    tolerance: float
    values: tuple[ValueCheck, ...]
    ran: str = ""  # of a module that stays as it is: what ran, and for what

    @property
    def worst(self) -> float:
        """The largest error of all."""
        return max(value.error for value in self.values)

    @property
    def differences(self) -> tuple[str, ...]:
        """What is not equal, in words, the loss first."""
        return tuple(
            f"{value.what}: {value.error:.2g} from that of one process"
            for value in self.values
            if not value.error <= self.tolerance
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """All ranks of a pipeline."""

    model: str
    gpus: Degree
    strategy: Strategy
    microbatches: Count
    stages: tuple[StageCheck, ...]
    parity: Parity | None = None  # where numerics were asked for

    DERIVED: ClassVar[tuple[str, ...]] = ("agrees",)

    @property
    def differences(self) -> tuple[str, ...]:
        """Everything that does not agree, the first rank first, values last."""
        found = tuple(text for stage in self.stages for text in stage.differences)
        return found + (self.parity.differences if self.parity is not None else ())

    @property
    def agrees(self) -> bool:
        """Whether the executor does what the plan says."""
        return not self.differences

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data: dict[str, Any] = encode(self)
        return data | {"differences": list(self.differences)}


def compared(
    planned: tuple[ExpectedCollective, ...], found: tuple[ExpectedCollective, ...]
) -> tuple[CollectiveCheck, ...]:
    """Collectives of one rank side by side, in the plan's order, those that it does not list last."""
    lists = [{(item.axis, item.phase, item.kind): item for item in items} for items in (planned, found)]
    keys: dict[CollectiveKey, None] = dict.fromkeys([*lists[0], *lists[1]])
    checks = []
    for axis, phase, kind in keys:
        pairs = [
            (item.count, item.bytes) if (item := table.get((axis, phase, kind))) else (0, 0) for table in lists
        ]
        (planned_count, planned_bytes), (found_count, found_bytes) = pairs
        checks.append(
            CollectiveCheck(
                axis=axis,
                phase=phase,
                kind=kind,
                planned_count=planned_count,
                planned_bytes=planned_bytes,
                found_count=found_count,
                found_bytes=found_bytes,
            )
        )
    return tuple(checks)
