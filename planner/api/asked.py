"""What is asked of a plan: a model, a cluster, how many GPUs of it, the work, and what the user wishes."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planner.errors import PlannerError
from planner.spec.codec import nearest
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.hardware_sources import HardwareLike, load_hardware
from planner.spec.model import ModelSpec
from planner.spec.sources import ModelLike, UserModule, resolve_model
from planner.spec.wishes import Fix, Wishes
from planner.spec.workload import TrainWorkload, Workload, workload_from_dict
from planner.units import GB, GIB, KIB, MB, MIB

GpusLike = int | str | tuple[int, int]

_MOST_GPUS = 1_000_000
USUAL_BATCH = 256
_FLAGS = {
    "max_memory": "max_memory_bytes",
    "schedule": "schedules",
    "deadline": "deadline_seconds",
    "price": "price_per_gpu_hour",
    "time_limit": "time_limit_seconds",
}  # what the command line calls it → the key of Wishes
_GOALS = {"time": "step_seconds", "gpus": "gpus", "cost": "cost_per_token"}
_WISHES = ("max_memory_bytes", "memory_margin", "recompute", "schedules", "minimize", "deadline_seconds",
           "price_per_gpu_hour", "time_limit_seconds", "solver")  # fmt: skip
_BYTES = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB, "MB": MB, "GB": GB, "TB": 1000 * GB}
_AMOUNT = re.compile(r"(\d{1,20}(?:\.\d{1,20})?(?:e[-+]\d{1,3})?) ?([A-Za-z]*)\Z", re.ASCII)
_COUNTS = re.compile(r"(\d{1,9})(?:\.\.(\d{1,9}))?\Z", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """A question to the planner, everything in it checked; the graph is not traced yet."""

    model: ModelLike  # as the user gave it
    hardware: HardwareLike
    found: ModelSpec | UserModule | Graph
    profile: HardwareProfile
    gpus: tuple[int, ...]  # every count that is tried, rising
    gpus_text: str  # `64`, or `8..1024`
    workload: TrainWorkload
    wishes: Wishes

    @property
    def spec(self) -> ModelSpec | None:
        """The model's, where it has one."""
        return self.found if isinstance(self.found, ModelSpec) else None


def plan_request(
    model: ModelLike,
    hardware: HardwareLike,
    gpus: GpusLike,
    workload: Mapping[str, Any] | Workload | None = None,
    fix: Mapping[str, Any] | str | Fix | None = None,
    **wishes: Any,
) -> PlanRequest:
    """The question of `planner.plan`; a global batch that is left out is one that the GPUs can run."""
    found, profile = resolve_model(model), load_hardware(hardware)
    low, high = gpu_range(gpus)
    profile.require_gpus(high)
    wished = wishes_of(fix, wishes)
    work = _work(workload, found, low if low == high else 0, wished.fix)
    return PlanRequest(
        model=model,
        hardware=hardware,
        found=found,
        profile=profile,
        gpus=gpu_counts(profile, low, high),
        gpus_text=str(low) if low == high else f"{low}..{high}",
        workload=work,
        wishes=wished,
    )


def gpu_range(gpus: GpusLike) -> tuple[int, int]:
    """The fewest and the most GPUs of `64`, `"8..1024"` or `(8, 1024)`."""
    low, high = _ends(gpus)
    for count in (low, high):
        if not 1 <= count <= _MOST_GPUS:
            raise _no_counts(f"a plan is for 1 to {_MOST_GPUS:,} GPUs", gpus)
    if low > high:
        raise PlannerError(
            "a range of GPUs goes from the fewest to the most",
            value=f"{low}..{high}",
            remedy=f"write {high}..{low}",
            key="gpus",
        )
    return low, high


def _ends(gpus: GpusLike) -> tuple[int, int]:
    if isinstance(gpus, str):
        matched = _COUNTS.match(gpus.strip())
        if matched is None:
            raise _no_counts("GPUs are a count, or a range of counts", gpus)
        return int(matched[1]), int(matched[2] or matched[1])
    pair: tuple[Any, ...] = tuple(gpus) if isinstance(gpus, Sequence) else (gpus, gpus)
    whole = all(isinstance(end, numbers.Integral) and not isinstance(end, bool) for end in pair)
    if not whole or len(pair) != 2:
        raise _no_counts("GPUs are a count, or the fewest and the most", gpus)
    return int(pair[0]), int(pair[1])


def _no_counts(rule: str, value: object) -> PlannerError:
    return PlannerError(rule, value=value, remedy="give such as 64 or 8..1024", key="gpus")


def gpu_counts(profile: HardwareProfile, low: int, high: int) -> tuple[int, ...]:
    """The counts of a range that are tried: its ends, powers of two, even parts of a node, and whole nodes.

    A node is what is linked without network cards.
    """
    inside = [level.gpus for level in profile.topology.values() if level.nics is None and level.gpus]
    node = max(inside, default=1)
    counts = {low, high, *(2**power for power in range(high.bit_length()))}
    counts |= {size for size in range(1, node + 1) if node % size == 0}
    counts |= set(range(-(-low // node) * node, high + 1, node))
    return tuple(sorted(count for count in counts if low <= count <= high))


def wishes_of(fix: Mapping[str, Any] | str | Fix | None, given: Mapping[str, Any]) -> Wishes:
    """Wishes by their own keys, or as the command line's flags call them; None is left out."""
    data: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or (name == "no_recompute" and value is False):
            continue
        key, value = ("recompute", ["none"]) if name == "no_recompute" else (_FLAGS.get(name, name), value)
        if key not in _WISHES:
            known = (*_WISHES, *_FLAGS, "no_recompute")
            raise PlannerError("this is nothing that a plan can keep to", value=name, remedy=nearest(name, known),
                               key="wishes")  # fmt: skip
        if key in data:
            raise PlannerError(f"{key} is given once", value=name, remedy="keep one of the two", key=key)
        data[key] = _plain(key, value)
    if fix:
        data["fix"] = fix if isinstance(fix, str) else Fix.to_plain(fix) if isinstance(fix, Fix) else dict(fix)
    return Wishes.from_dict(data)


def _plain(key: str, value: Any) -> Any:
    """A wish as its own key takes it."""
    if key == "max_memory_bytes" and isinstance(value, str):
        return bytes_of(value)
    if key == "minimize":
        return _GOALS.get(value, value) if isinstance(value, str) else value
    if key in ("schedules", "recompute"):
        return [value] if isinstance(value, str) else value
    return value


def bytes_of(text: str) -> float:
    """`70GiB` → bytes; a unit is spelled."""
    matched = _AMOUNT.match(text.strip())
    if matched is None or matched[2] not in _BYTES:
        raise PlannerError(
            "memory is a number and its unit: " + ", ".join(_BYTES),
            value=text,
            remedy="write such as 70GiB",
            key="max_memory",
        )
    size = float(matched[1]) * _BYTES[matched[2]]
    if not size:
        raise PlannerError("a layout takes memory", value=text, remedy="leave it out for all of the GPU's",
                           key="max_memory")  # fmt: skip
    return size


def _work(
    given: Mapping[str, Any] | Workload | None, found: ModelSpec | UserModule | Graph, gpus: int, fix: Fix
) -> TrainWorkload:
    spec = found if isinstance(found, ModelSpec) else None
    work = workload_from_dict(given or {}, model=spec)
    if not isinstance(work, TrainWorkload):
        raise PlannerError("a plan is of training so far", value=work.mode, remedy="leave mode out", key="mode")
    if isinstance(given, TrainWorkload) or (isinstance(given, Mapping) and "global_batch" in given):
        return work
    return replace(work, global_batch=usual_batch(gpus, fix))


def usual_batch(gpus: int, fix: Fix) -> int:
    """The batch nearest to 256 that every replica can have its share of: the odd part of the GPUs times 2ⁿ.

    What the fixed degrees and microbatch need divides it too. Of several counts of GPUs (0) nothing is asked.
    """
    odd = gpus // (gpus & -gpus) if gpus else 1
    unit = math.lcm(odd, (fix.dp or 1) * (fix.microbatch or 1))
    batches = [unit << power for power in range(USUAL_BATCH.bit_length())]
    return min(batches, key=lambda batch: (abs(batch - USUAL_BATCH), batch))
