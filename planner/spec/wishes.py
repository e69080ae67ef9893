"""What a user asks of a plan, besides model, hardware and workload: keys held, limits, what is minimised."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from planner.errors import PlannerError
from planner.spec.codec import Bytes, Degree, Range, Seconds, decode, encode, nearest
from planner.spec.orders import ONE_STAGE_A_RANK, in_two_parts
from planner.spec.strategy import Overlap, Recompute, Schedule, Strategy
from planner.spec.yaml_text import Source

Goal = Literal["step_seconds", "gpus", "cost_per_token"]
Solver = Literal["highs", "cbc"]
Price = Annotated[float, Range(0.0, 1e9)]
Margin = Annotated[float, Range(0.0, 0.95)]

RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "zb", "zbv")

_INTEGER = re.compile(r"[-+]?\d{1,4000}\Z", re.ASCII)
_WORDS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fix:
    """Keys of a strategy at given values. A key that is None is free: the search decides."""

    tp: Degree | None = None
    pp: Degree | None = None
    dp: Degree | None = None
    cp: Degree | None = None
    ep: Degree | None = None
    etp: Degree | None = None
    vpp: Degree | None = None
    microbatch: Degree | None = None
    zero: Annotated[int, Range(0, 3)] | None = None
    dp_replicate: Degree | None = None
    sp: bool | None = None
    recompute: Literal["none", "selective", "full", "auto"] | None = None  # auto is free
    schedule: Schedule | None = None
    order: str | None = None
    overlap: Overlap | None = None
    grad_dtype: Literal["fp32", "bf16", "fp16"] | None = None

    @classmethod
    def from_text(cls, text: str) -> Fix:
        """`tp=8,pp=4,sp=true,overlap=dp+tp,schedule=1f1b,order=tp-cp-pp-dp`; empty for nothing."""
        return decode(Wishes, {"fix": _items(text)}).fix

    def to_plain(self) -> dict[str, Any]:
        """YAML data of the keys that are held."""
        return {key: encode(value) for key, value in self.given.items()}

    def __post_init__(self) -> None:
        Strategy(**self.given)  # what no annotation says: an order names each axis once

    @property
    def given(self) -> dict[str, Any]:
        """The keys that are held, with their values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def text(self) -> str:
        """The same as `from_text` reads it."""
        return ",".join(f"{key}={_shown(value)}" for key, value in self.given.items())

    @property
    def gpus_unit(self) -> int:
        """The GPUs of a plan are a multiple of this: what the fixed degrees take."""
        return math.prod(degree or 1 for degree in (self.tp, self.pp, self.cp, self.dp))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a plan has to keep to, and what it is to be best at."""

    fix: Fix = Fix()
    max_memory_bytes: Bytes = 0.0  # of a device; 0: all that it has
    memory_margin: Margin = 0.0  # share of that memory kept free above the upper end of an estimate's interval
    recompute: tuple[Recompute, ...] = RECOMPUTES  # that may be chosen from
    schedules: tuple[Schedule, ...] = SCHEDULES  # that a pipeline may be run by
    minimize: Goal = "step_seconds"
    deadline_seconds: Seconds = 0.0  # of a step, that the fewest GPUs have to meet
    price_per_gpu_hour: Price = 0.0  # in any currency
    time_limit_seconds: Seconds = 0.0  # of the search; 0: until the plan is proven best
    solver: Solver = "highs"

    @classmethod
    def from_dict(cls, data: Any, source: Source | None = None) -> Wishes:
        """Wishes from plain data; `fix` may be the text of `Fix.from_text`."""
        if isinstance(data, Mapping) and isinstance(data.get("fix"), str):
            data = {**data, "fix": _items(data["fix"])}
        return decode(cls, data, source)

    def to_dict(self) -> dict[str, Any]:
        """YAML data without what stands at its default."""
        data: dict[str, Any] = encode(self, omit_defaults=True)
        return data

    def __post_init__(self) -> None:
        _require_choice("recompute", self.recompute, self.fix.recompute, free="auto")
        _require_choice("schedules", self.schedules, self.fix.schedule)
        if self.minimize == "gpus" and not self.deadline_seconds:
            raise PlannerError(
                "the fewest GPUs are those that meet a deadline",
                value=self.deadline_seconds,
                remedy="give the longest step that will do, in seconds",
                key="deadline_seconds",
            )
        if self.minimize != "gpus" and self.deadline_seconds:
            raise PlannerError(
                "a deadline belongs to minimize: gpus",
                value=self.deadline_seconds,
                remedy="set minimize to gpus, or leave deadline_seconds out",
                key="deadline_seconds",
            )
        if self.minimize == "cost_per_token" and not self.price_per_gpu_hour:
            raise PlannerError(
                "the cost of a token follows from the price of a GPU",
                value=self.price_per_gpu_hour,
                remedy="give what a GPU costs in an hour",
                key="price_per_gpu_hour",
            )

    def of_own_module(self, *, mixes_whole: bool) -> Wishes:
        """Those of a user's own module: what the executor refuses for one is not chosen unless asked for.

        It runs blocks again as a whole, a pipeline with one stage a rank, and parts of a sequence where nothing
        that is never cut reads all of it.
        """
        recompute, schedules = self.recompute, self.schedules
        if self.fix.recompute in (None, "auto"):
            recompute = tuple(word for word in recompute if word != "selective") or recompute
        if self.fix.schedule is None and self.fix.vpp in (None, 1):
            schedules = tuple(word for word in schedules if word in ONE_STAGE_A_RANK) or schedules
        fix = replace(self.fix, sp=False) if mixes_whole and self.fix.sp is None else self.fix
        return replace(self, fix=fix, recompute=recompute, schedules=schedules)

    @property
    def allowed_recompute(self) -> tuple[Recompute, ...]:
        """What a block may recompute, the least first: the word that is fixed, or those allowed."""
        held = self.fix.recompute
        allowed = self.recompute if held in (None, "auto") else (held,)
        return tuple(word for word in RECOMPUTES if word in allowed)

    @property
    def allowed_schedules(self) -> tuple[Schedule, ...]:
        """What may run a pipeline: the schedule that is fixed, or those allowed."""
        allowed = (self.fix.schedule,) if self.fix.schedule else self.schedules
        return tuple(word for word in SCHEDULES if word in allowed)

    def recompute_under(self, schedule: Schedule, pp: int) -> tuple[Recompute, ...]:
        """What of the allowed a block may recompute in a pipeline that this schedule runs."""
        split = in_two_parts(schedule, pp)
        return tuple(word for word in self.allowed_recompute if word == "none" or not split)

    def capacity_bytes(self, device_bytes: float) -> float:
        """What the upper end of an estimate's interval may take of a device."""
        limit = min(device_bytes, self.max_memory_bytes or device_bytes)
        return limit * (1.0 - self.memory_margin)


def _require_choice(key: str, allowed: tuple[str, ...], held: str | None, free: str = "") -> None:
    """Allowed words are several or one, each once, and what is fixed is among them."""
    if not allowed or len(set(allowed)) < len(allowed):
        raise PlannerError(
            f"{key} lists what is allowed: one word or more, each once",
            value=list(allowed),
            remedy=f"leave {key} out to allow all",
            key=key,
        )
    if held is not None and held not in (free, *allowed):
        raise PlannerError(
            f"what is fixed is among the allowed {key}: " + ", ".join(allowed),
            value=held,
            remedy=f"allow {held}, or leave it out of fix",
            key="fix." + ("recompute" if key == "recompute" else "schedule"),
        )


def _items(text: str) -> dict[str, Any]:
    """`key=value` pairs separated by commas as plain data, values still unchecked."""
    data: dict[str, Any] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, equals, word = (part.strip() for part in item.partition("="))
        key = name.replace("-", "_")
        if not equals or not word:
            raise _wrong_item(item, "a fixed key is written key=value", _example(key))
        if key not in _KEYS:
            raise _wrong_item(name, "this is no key of a strategy that can be fixed", nearest(key, _KEYS))
        if key in data:
            raise _wrong_item(item, f"{key} is fixed once", "keep one of the two")
        data[key] = _overlap(word) if key == "overlap" else _plain(word)
    return data


def _plain(word: str) -> Any:
    if _INTEGER.match(word):
        return int(word)
    return _WORDS.get(word.lower(), word)


def _overlap(word: str) -> dict[str, bool]:
    """`dp+tp`: these run beside computation and no others; `none` for none."""
    axes = [item.name for item in fields(Overlap)]
    given = [] if word == "none" else [part.strip() for part in word.split("+")]
    for part in given:
        if part not in axes:
            rule = "overlap names axes, joined by +: " + ", ".join(axes)
            raise _wrong_item(word, rule, nearest(part, (*axes, "none")), key="fix.overlap")
    return {axis: axis in given for axis in axes}


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Overlap):
        return "+".join(item.name for item in fields(value) if getattr(value, item.name)) or "none"
    return str(value)


def _example(key: str) -> str:
    return f"write {key}=8" if key in _KEYS else "write such as tp=8,pp=4"


def _wrong_item(value: str, rule: str, remedy: str, key: str = "fix") -> PlannerError:
    return PlannerError(rule, value=value, remedy=remedy, key=key)


_KEYS = tuple(item.name for item in fields(Fix))
