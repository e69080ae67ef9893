"""A question with something changed: a parameter of the cluster or the work, a wish, or a limit eased."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from planner.errors import PlannerError
from planner.search.answers import Question
from planner.spec.codec import nearest
from planner.spec.hardware import HardwareProfile
from planner.spec.overrides import SHORT_NAMES, with_changes
from planner.spec.wishes import RECOMPUTES, SCHEDULES, Fix, Wishes
from planner.spec.workload import TrainWorkload
from planner.units import GIB

_BANDWIDTH, _PEAK, _MEMORY = "device.memory_bandwidth_gb_per_second", "device.peak_tflops", "device.memory_gib"
_WORKLOAD = tuple(item.name for item in fields(TrainWorkload) if item.name != "mode")
NAMES = (*SHORT_NAMES, "memory_bandwidth", "memory", "peak_flops", "max_memory", "gpus", *_WORKLOAD)

_FACTOR = re.compile(r"(\d+\.?\d*|\.\d+)x\Z", re.ASCII)


def varied(question: Question, gpus: int, changes: Mapping[str, Any]) -> tuple[Question, int]:
    """The question and the number of GPUs with keys changed.

    Keys are `gpus`, those of the workload, `max_memory` in GiB, the names of NAMES, and any dotted key of the
    profile. A value is what it shall be, or a factor such as `0.25x`.
    """
    workload: dict[str, Any] = {}
    profile: dict[str, Any] = {}
    wishes = question.wishes
    for key, value in changes.items():
        plain = key.removeprefix("workload.")
        if key == "gpus":
            gpus = _gpus(gpus, value)
        elif plain in _WORKLOAD:
            workload[plain] = value
        elif key == "max_memory":
            wishes = replace(wishes, max_memory_bytes=_memory(question, value))
        else:
            profile |= _of_profile(question.profile, key.removeprefix("hardware."), value)
    changed = replace(
        question,
        wishes=wishes,
        workload=with_changes(question.workload, workload) if workload else question.workload,
        profile=with_changes(question.profile, profile) if profile else question.profile,
    )
    return changed, gpus


def _gpus(now: int, value: Any) -> int:
    factor = _factor(value)
    wanted = value if factor is None else round(now * factor)
    if isinstance(wanted, bool) or not isinstance(wanted, int) or not 1 <= wanted <= 1_000_000:
        raise PlannerError("gpus is at least 1", value=value, remedy="give a number, or 0.5x", key="gpus")
    return wanted


def _memory(question: Question, value: Any) -> float:
    factor, device = _factor(value), question.profile.device.memory_bytes
    if factor is not None:
        return factor * min(device, question.wishes.max_memory_bytes or device)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise PlannerError("max_memory is above 0 GiB", value=value, remedy="give GiB, or 0.8x", key="max_memory")
    return float(value) * GIB


def _of_profile(profile: HardwareProfile, key: str, value: Any) -> dict[str, Any]:
    if key == "memory_bandwidth":
        return {_BANDWIDTH: value}
    if key == "memory":
        return {_MEMORY: value}
    if key == "peak_flops":
        if _factor(value) is None:
            raise PlannerError(
                "peak_flops is of every precision, so it takes a factor",
                value=value,
                remedy=f"give 2x, or change one: {_PEAK}.bf16",
                key=key,
            )
        return {f"{_PEAK}.{name}": value for name in profile.device.peak_tflops}
    if "." not in key and key not in SHORT_NAMES and not hasattr(profile, key):
        raise PlannerError(
            "this is no parameter that can be varied", value=key, remedy=nearest(key, NAMES), key="vary"
        )
    return {key: value}


def _factor(value: Any) -> float | None:
    match = _FACTOR.match(value) if isinstance(value, str) else None
    return float(match[1]) if match else None


def scaled(question: Question, key: str, factor: float) -> Question:
    """One parameter times a factor."""
    return varied(question, 1, {key: f"{factor:.12f}x"})[0]


def with_wishes(question: Question, **changes: Any) -> Question:
    """Other wishes."""
    return replace(question, wishes=replace(question.wishes, **changes))


def released(question: Question, *keys: str) -> Question:
    """Fixed keys of the strategy left free."""
    given = {key: value for key, value in question.wishes.fix.given.items() if key not in keys}
    return with_wishes(question, fix=Fix(**given))


def with_more_memory(question: Question, further_bytes: float) -> Question:
    """Devices with more memory, and as much more allowed of it."""
    device = replace(question.profile.device, memory_gib=question.profile.device.memory_gib + further_bytes / GIB)
    limit = question.wishes.max_memory_bytes
    changed = replace(question, profile=replace(question.profile, device=device))
    return with_wishes(changed, max_memory_bytes=limit + further_bytes) if limit else changed


def every_recompute(question: Question) -> Question:
    """Any recomputation allowed."""
    wishes = question.wishes
    fix = Fix(**{key: value for key, value in wishes.fix.given.items() if key != "recompute"})
    return with_wishes(question, recompute=RECOMPUTES, fix=fix)


def every_schedule(question: Question) -> Question:
    """Any schedule allowed."""
    return with_wishes(question, schedules=SCHEDULES)


def limits_recompute(question: Question) -> bool:
    """Whether more recomputation could be allowed."""
    return every_recompute(question).wishes.allowed_recompute != question.wishes.allowed_recompute


def limits_schedules(question: Question) -> bool:
    """Whether more schedules could be allowed; one that is fixed is left free instead."""
    free = "schedule" not in question.wishes.fix.given
    return free and every_schedule(question).wishes.schedules != question.wishes.schedules


def capacity_bytes(question: Question) -> float:
    """What the upper end of an estimate's interval may take."""
    return question.wishes.capacity_bytes(question.profile.device.memory_bytes)


def plain_wishes(wishes: Wishes) -> Wishes:
    """The same layouts, the shortest step of them."""
    return replace(wishes, minimize="step_seconds", deadline_seconds=0.0)
