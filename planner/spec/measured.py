"""What a run of a plan measured: the file `measured.json` that stands beside the plan."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from planner.errors import PlannerError
from planner.spec.codec import Bytes, Count, Degree, Range, Seconds, decode, encode
from planner.spec.files import read_text, write_text
from planner.spec.strategy import Strategy
from planner.spec.workload import Context, Stack, Workload, stack_of_run
from planner.spec.yaml_text import Source

MEASURED_VERSION: Literal[1] = 1

Loss = Annotated[float, Range(-1e30, 1e30)]

_LARGEST_FILE_BYTES = 64 * 1000**2


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """The highest that one rank's memory stood while steps ran."""

    rank: Count
    stage: Count  # pipeline rank
    allocated_bytes: Bytes  # what tensors took; on a CPU the process
    reserved_bytes: Bytes  # what the allocator held; on a CPU the same


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Steps of a run on real devices, told apart from what a plan predicts of them."""

    version: Literal[1] = MEASURED_VERSION
    model: str  # as the plan names it
    hardware: str  # that the plan was made for
    gpus: Degree
    layout: str  # digest of the plan's layout as it ran
    workload: Workload
    strategy: Strategy
    device: str  # name of what it ran on, such as `NVIDIA H100 80GB HBM3` or `cpu`
    backend: str  # of the collectives
    torch: str
    driver: str = ""  # CUDA's version, none on a CPU
    compiled: bool = False
    context: Context = "gather"
    date: str  # when it ended, as ISO 8601
    first_step: Count  # number of the first step of this run; above 0 after a resume
    each_seconds: tuple[Seconds, ...]  # wall time of every step of this run, in order
    settling_steps: Count  # the first of them, which warm up and do not count
    parts: dict[str, Seconds] = field(default_factory=dict)  # of a step on rank 0, where they were measured
    memory: tuple[RankMemory, ...]  # by rank
    first_loss: Loss
    last_loss: Loss

    DERIVED: ClassVar[tuple[str, ...]] = ("step_seconds", "spread_seconds", "tokens_per_second")

    def __post_init__(self) -> None:
        if self.settling_steps >= len(self.each_seconds):
            raise PlannerError(
                "at least one step counts",
                value=f"{len(self.each_seconds)} steps, {self.settling_steps} of them to settle",
                remedy="run more steps",
                key="each_seconds",
            )
        ranks, stages, degrees = self.gpus, self.strategy.pp, self.strategy.gpus
        strays = [own for own in self.memory if own.rank >= ranks or own.stage >= stages]
        told = [f"rank {own.rank} of stage {own.stage}" for own in strays]
        for holds, key, rule, value in (
            (degrees == ranks, "gpus", f"the strategy's degrees take {degrees} GPUs", ranks),
            (not strays, "memory", f"ranks are below {ranks} and stages below {stages}", told),
        ):
            if not holds:
                remedy = "give the measured.json as tp-plan run wrote it"
                raise PlannerError(rule, value=value, remedy=remedy, key=key)

    @property
    def stack(self) -> Stack:
        """The software that ran."""
        return stack_of_run(compiled=self.compiled)

    @property
    def counted_seconds(self) -> tuple[float, ...]:
        """Wall time of the steps that count."""
        return self.each_seconds[self.settling_steps :]

    @property
    def step_seconds(self) -> float:
        """The median step."""
        return statistics.median(self.counted_seconds)

    @property
    def spread_seconds(self) -> float:
        """Median distance of a step from the median step."""
        middle = self.step_seconds
        return statistics.median(abs(seconds - middle) for seconds in self.counted_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, over the median step; 0 for work that is not training."""
        tokens = getattr(self.workload, "tokens", 0)
        return tokens / self.step_seconds if self.step_seconds else 0.0

    @property
    def peak_by_stage(self) -> dict[int, RankMemory]:
        """The rank of each pipeline stage that took the most."""
        peaks: dict[int, RankMemory] = {}
        for entry in self.memory:
            if entry.stage not in peaks or entry.reserved_bytes > peaks[entry.stage].reserved_bytes:
                peaks[entry.stage] = entry
        return dict(sorted(peaks.items()))

    @classmethod
    def from_dict(cls, data: Any, source: Source | None = None) -> Measured:
        """From plain data; totals that are given must follow from the steps."""
        return decode(cls, data, source)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the totals."""
        data: dict[str, Any] = encode(self)
        return data

    def save(self, path: str | Path) -> None:
        """Write the file as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")


def stack_mismatch(planned: Stack, ran: Stack) -> str:
    """That a run's software is not what its plan predicts; empty where it is."""
    if planned == ran:
        return ""
    return f"the plan predicts stack {planned}, the run is {ran}: to compare them, plan with --stack {ran}"


def context_mismatch(planned: Stack, ran: Context, strategy: Strategy) -> str:
    """That a run exchanges keys and values otherwise than its plan predicts; empty where it does not.

    A plan for Megatron is one of its ring.
    """
    if strategy.cp == 1 or ran == "gather" or planned == "megatron":
        return ""
    return (
        f"the plan predicts keys and values gathered over cp {strategy.cp}, the run passes them around a ring: "
        "its exchanges and its memory are others"
    )


def load_measured(path: str | Path) -> Measured:
    """What a run measured, from its file."""
    text = read_text(Path(path), _LARGEST_FILE_BYTES)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlannerError(
            "a file of measurements is JSON",
            value=f"{path}: {error}",
            remedy="give the measured.json that tp-plan run wrote",
            key="file",
        ) from None
    return Measured.from_dict(data, Source(name=str(path)))
