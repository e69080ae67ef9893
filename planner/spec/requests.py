"""A training layout as a command line asks for it: flags → workload and strategy, and back."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.spec.codec import nearest
from planner.spec.estimate import Estimate
from planner.spec.files import write_text
from planner.spec.graph import Graph
from planner.spec.legality import nearest_batches, violations
from planner.spec.model import ModelSpec
from planner.spec.sources import UserModule
from planner.spec.strategy import Overlap, Strategy
from planner.spec.workload import TrainWorkload, workload_from_dict
from planner.spec.yaml_text import dump_yaml

_SERVING = ("attention_dp", "replicas")
STRATEGY_KEYS = tuple(item.name for item in fields(Strategy) if item.name not in _SERVING)
WORKLOAD_KEYS = tuple(item.name for item in fields(TrainWorkload) if item.name != "mode")
OVERLAPS = tuple(item.name for item in fields(Overlap))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRequest:
    """What is to be trained, and how the work is divided."""

    workload: TrainWorkload
    strategy: Strategy
    note: str = ""  # what was chosen for the user, who may want to know

    def told_with(self, found: Estimate) -> Estimate:
        """The estimate, that also says what was chosen."""
        return replace(found, warnings=(self.note, *found.warnings)) if self.note else found


def training_request(
    model: ModelSpec | UserModule | Graph, gpus: int, given: Mapping[str, Any]
) -> TrainingRequest:
    """The request of flags, `None` where one was left out.

    A global batch that was left out is the default, or where that cannot run the nearest one that can.
    """
    spec = model if isinstance(model, ModelSpec) else None
    told = {key: value for key, value in given.items() if value is not None}
    layout = {key: told[key] for key in STRATEGY_KEYS if key in told}
    if "overlap" in layout:
        layout["overlap"] = overlap_of(layout["overlap"])
    strategy = Strategy.from_dict(layout, gpus=gpus)
    wanted = {key: told[key] for key in WORKLOAD_KEYS if key in told}
    workload = workload_from_dict(wanted, model=spec)
    assert isinstance(workload, TrainWorkload)
    if "global_batch" in told:
        return TrainingRequest(workload=workload, strategy=strategy)
    return _with_legal_batch(spec, workload, strategy, gpus)


def _with_legal_batch(
    spec: ModelSpec | None, workload: TrainWorkload, strategy: Strategy, gpus: int
) -> TrainingRequest:
    """The default batch, or the nearest one that the degrees and the schedule can run."""
    broken = [found for found in violations(spec, workload, strategy, gpus) if found.key == "global_batch"]
    batches = nearest_batches(workload, strategy) if broken else ()
    if not batches:
        return TrainingRequest(workload=workload, strategy=strategy)
    usual = workload.global_batch
    chosen = min(batches, key=lambda batch: (abs(batch - usual), batch))
    note = f"global batch {chosen}, the nearest to {usual} that can run ({broken[0].rule}); --global-batch sets it"
    return TrainingRequest(workload=replace(workload, global_batch=chosen), strategy=strategy, note=note)


def write_estimate(found: Estimate, path: Path) -> None:
    """The estimate as a YAML file that `Estimate.from_dict` reads back."""
    write_text(path, dump_yaml(found.to_dict()))


def overlap_of(text: str) -> dict[str, bool]:
    """`tp,dp` → which communication runs beside computation, and which does not; `none` for none of it."""
    words = [] if text.strip() in ("", "none") else [word.strip() for word in text.split(",")]
    for word in words:
        if word not in OVERLAPS:
            raise PlannerError(
                "overlap names axes, separated by commas: " + ", ".join(OVERLAPS),
                value=text,
                remedy=nearest(word, (*OVERLAPS, "none")),
                key="overlap",
            )
    return {axis: axis in words for axis in OVERLAPS}


def command_line(model: str, hardware: str, request: TrainingRequest) -> str:
    """The command that estimates a request, without the keys that stand at their default."""
    strategy, workload = request.strategy, request.workload
    words = ["tp-plan", "estimate", model, "--hardware", hardware, "--gpus", str(strategy.gpus)]
    words += _flags(strategy, [key for key in strategy.to_dict() if key != "dp"])
    told = [key for key in workload.to_dict() if key != "mode"]
    words += _flags(workload, [key for key in told if (key, getattr(workload, key)) != ("precision", "bf16")])
    return shlex.join(words)


def changed_flags(before: Strategy, after: Strategy) -> str:
    """The flags that lead from one strategy to another: `--recompute full`."""
    words = ["--gpus", str(after.gpus)] if after.gpus != before.gpus else []
    words += _flags(after, [key for key in STRATEGY_KEYS if getattr(after, key) != getattr(before, key)])
    return shlex.join(words)


def _flags(of: Strategy | TrainWorkload, keys: list[str]) -> list[str]:
    words: list[str] = []
    for key in keys:
        value, flag = getattr(of, key), key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Overlap):
            words += [f"--{flag}", ",".join(axis for axis in OVERLAPS if getattr(value, axis)) or "none"]
        else:
            words += [f"--{flag}", f"{value:g}" if isinstance(value, float) else str(value)]
    return words
