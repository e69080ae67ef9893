"""Measured training runs: what was run, what it took, and which of them an estimate is judged by.

`read_runs` takes CSV tables of three kinds and knows them by their columns.

- Training runs, a row each. Needed: `gpu gpus seq_len micro_batch global_batch`, the model's shape (`layers`
  `hidden` `heads`, or the name of a bundled `model`), and `derived_step_time_s` (or `step_seconds`) or
  `mem_gb_per_gpu`. Known besides: `id family source trust kv_heads head_dim ffn ffn_type vocab experts topk
  moe_ffn gpu_mem_gb gpus_per_node inter_link precision tp sp pp vpp cp ep etp dp zero_stage_or_fsdp recompute
  memory_counts stack notes config_hint`. A missing degree is 1, a missing dp what the others leave, a missing
  precision bf16. See `runs_training.py`.
- Megatron timings on A100, known by `iteration_time_ms`, and Megatron memory, known by `mem_max_allocated_bytes`:
  see `runs_megatron.py`.

Bytes of memory are compared with what they count: `allocated` by tensors, `reserved` by the allocator, or used on
the `device`. `trust` goes from A (best) to D, which is never judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from planner.errors import PlannerError

Counts = Literal["allocated", "reserved", "device"]
Trust = Literal["A", "B", "C", "D"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredMemory:
    """The peak of a run's worst GPU, or of its last rank: Megatron logs there."""

    bytes: float
    counts: Counts
    rank: Literal["worst", "last"] = "worst"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measured run. Model, hardware, workload and strategy are what `planner.estimate` takes."""

    id: str
    source: str  # who measured; tables and regret never mix two
    where: str  # file:line
    model: Mapping[str, Any] = field(default_factory=dict)
    hardware: str | Mapping[str, Any] = ""
    gpus: int = 0
    workload: Mapping[str, Any] = field(default_factory=dict)
    strategy: Mapping[str, Any] = field(default_factory=dict)
    step_seconds: float | None = None  # none: only memory was measured
    memory: MeasuredMemory | None = None  # none: only time was measured
    trust: Trust = "B"
    software: str = ""
    assumed: tuple[str, ...] = ()  # keys of the strategy that the source does not state
    notes: str = ""
    excluded: str = ""  # why it is not judged

    @property
    def judged(self) -> bool:
        """Whether an estimate of it is compared with what was measured."""
        return not self.excluded

    @property
    def layout(self) -> str:
        """The degrees as people say them: `tp8 pp4 dp2`."""
        keys = ("tp", "cp", "ep", "etp", "pp", "vpp", "dp", "zero", "microbatch")
        return (
            " ".join(f"{key}{self.strategy[key]}" for key in keys if self.strategy.get(key, 1) != 1) or "one GPU"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTable:
    """The runs of one or more files, in their order."""

    files: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def judged(self) -> tuple[Run, ...]:
        """Runs that an estimate is compared with."""
        return tuple(run for run in self.runs if run.judged)

    @property
    def sources(self) -> tuple[str, ...]:
        """Who measured, in the order of the files."""
        return tuple(dict.fromkeys(run.source for run in self.runs))

    def excluded_by_reason(self) -> dict[tuple[str, str], int]:
        """How many runs of a source are not judged, by reason; the most frequent first."""
        counts = Counter((run.source, run.excluded) for run in self.runs if run.excluded)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def read_runs(paths: str | Path | Iterable[str | Path]) -> RunTable:
    """The runs of CSV files. A torn file or a wrong cell is a PlannerError with file, line and column."""
    from planner.spec import runs_megatron, runs_training
    from planner.spec.runs_csv import read_table

    files = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not files:
        raise PlannerError("a table of runs is given", remedy="name a CSV file", key="file")
    runs: list[Run] = []
    for file in files:
        table = read_table(Path(file))
        if "iteration_time_ms" in table.columns:
            runs += runs_megatron.read_timings(table)
        elif "mem_max_allocated_bytes" in table.columns:
            runs += runs_megatron.read_memory(table)
        else:
            runs += runs_training.read_training(table)
    return RunTable(files=tuple(map(str, files)), runs=tuple(runs))
