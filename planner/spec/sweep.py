"""A sweep: the best layout at every point of one or two parameters, and where it changes.

`inter_node_bandwidth=0.25x:4x` is a range of factors, `seq_len=2048:16384` one of values, `global_batch=64,96,128`
a list. A range has eight points, evenly spaced on a logarithmic scale; one of whole numbers whose ends are a power
of two apart doubles from one to the next. A range of factors that reaches across 1 has the unchanged value too.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from planner.errors import PlannerError
from planner.spec.codec import Bytes, Count, Degree, Seconds, encode
from planner.spec.estimate import Rate
from planner.spec.plan import Objective
from planner.spec.strategy import Strategy
from planner.spec.wishes import Goal

POINTS = 8  # of a range
_MOST_POINTS = 1000  # of a list
_NEAR = 0.3  # of the distance between two factors: one so near to 1 gives way to it

_NUMBER = r"((?:\d{1,18}\.?\d{0,18}|\.\d{1,18})(?:e[-+]?\d{1,2})?)"
_RANGE = re.compile(rf"{_NUMBER}(x?):{_NUMBER}(x?)\Z", re.ASCII)
_PLAIN = re.compile(rf"{_NUMBER}\Z", re.ASCII)

Value = float | int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """The best layout with some values; none where nothing fits."""

    values: tuple[Value, ...]  # of the keys, as they were asked for
    gpus: Degree
    strategy: Strategy | None = None
    step_seconds: Seconds = 0.0
    objective: Objective = 0.0  # in the unit of what is minimised
    tokens_per_second_per_gpu: Rate = 0.0
    memory_bytes: Bytes = 0.0
    memory_high_bytes: Bytes = 0.0  # upper end of its interval
    gap: float = 0.0  # share that a better layout could save at most; above 0 where the time was up
    reason: str = ""  # why there is none

    @property
    def label(self) -> str:
        """The degrees of the best layout; `–` where nothing fits."""
        return self.strategy.label if self.strategy else "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepChange:
    """Two neighbouring points whose best layouts have other degrees."""

    before: SweepPoint
    after: SweepPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Points in the order of the values, the last key's the fastest."""

    keys: tuple[str, ...]
    values: tuple[tuple[Value, ...], ...]  # of each key
    points: tuple[SweepPoint, ...]  # fewer than asked for where the sweep was interrupted
    minimize: Goal = "step_seconds"
    interrupted: bool = False

    DERIVED: ClassVar[tuple[str, ...]] = ("asked", "changes")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data: dict[str, Any] = encode(self, omit_defaults=True)
        return data

    @property
    def asked(self) -> Count:
        """Points that were asked for."""
        return math.prod(map(len, self.values))

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        """Each point with its values by key, for a table."""
        return tuple(
            {**dict(zip(self.keys, point.values, strict=True)), "best": point.label, **_figures(point)}
            for point in self.points
        )

    @property
    def changes(self) -> tuple[SweepChange, ...]:
        """Neighbours along the last key between which the best degrees change."""
        return tuple(
            SweepChange(before=one, after=other)
            for one, other in itertools.pairwise(self.points)
            if one.values[:-1] == other.values[:-1] and one.label != other.label
        )

    def at(self, *values: Value) -> SweepPoint | None:
        """The point with these values; none where the sweep did not come to it."""
        return next((point for point in self.points if point.values == values), None)


def _figures(point: SweepPoint) -> dict[str, Any]:
    return {
        "gpus": point.gpus,
        "step_seconds": point.step_seconds,
        "tokens_per_second_per_gpu": point.tokens_per_second_per_gpu,
        "memory_bytes": point.memory_bytes,
        "reason": point.reason,
    }


def vary_of(texts: Iterable[str]) -> dict[str, tuple[Value, ...]]:
    """`key=A:B` and `key=v1,v2,…`, one for each parameter, as keys and their points."""
    found: dict[str, tuple[Value, ...]] = {}
    for text in texts:
        key, equals, values = (part.strip() for part in text.partition("="))
        if not key or not equals or not values:
            raise PlannerError(
                "what is varied is written key=A:B or key=v1,v2",
                value=text,
                remedy="write such as inter_node_bandwidth=0.25x:4x",
                key="vary",
            )
        key = key.replace("-", "_")
        if key in found:
            raise PlannerError(f"{key} is varied once", value=text, remedy="keep one of the two", key="vary")
        found[key] = points_of(key, values.split(","))
    return found


def points_of(key: str, values: Sequence[Any]) -> tuple[Value, ...]:
    """The values of a key, its ranges spelled out, each once."""
    found: list[Value] = []
    for value in values:
        if not isinstance(value, str):
            found.append(value)
            continue
        word = value.strip()
        spread = _RANGE.match(word)
        if ":" in word and spread is None:
            raise _wrong_range(key, word, "a range is A:B, two values or two factors")
        found += _spread(key, word, spread) if spread else [_read(word)]
    if not found or "" in found:
        raise PlannerError(
            f"{key} takes a value or more", value=",".join(map(str, values)), remedy="give values", key="vary"
        )
    if len(found) > _MOST_POINTS:
        raise PlannerError(
            f"a parameter takes at most {_MOST_POINTS} values", value=len(found), remedy="give fewer", key="vary"
        )
    return tuple(dict.fromkeys(found))


def _spread(key: str, text: str, found: re.Match[str]) -> list[Value]:
    """The points of a range."""
    low, high = float(found[1]), float(found[3])
    if bool(found[2]) != bool(found[4]):
        raise _wrong_range(key, text, "both ends of a range are values, or both are factors such as 0.25x")
    if not 0.0 < low <= high:
        raise _wrong_range(key, text, "a range rises from above 0")
    if low == high:
        return [_read(found[1] + found[2])]
    spaced = [low * (high / low) ** (place / (POINTS - 1)) for place in range(POINTS)]
    if found[2]:
        near = (high / low) ** (_NEAR / (POINTS - 1))
        kept = [factor for factor in spaced if not low < 1.0 < high or max(factor, 1.0 / factor) > near]
        factors = {*kept, 1.0} if low < 1.0 < high else {*kept}
        return [f"{factor:.3g}x" for factor in sorted(factors)]
    if low.is_integer() and high.is_integer() and not {".", "e"} & set(found[1] + found[3]):
        doublings = math.log2(high / low)
        if doublings == round(doublings):
            return [int(low) * 2**times for times in range(round(doublings) + 1)]
        return list(dict.fromkeys(round(value) for value in spaced))
    return [float(f"{value:.4g}") for value in spaced]


def _read(word: str) -> Value:
    """A number where it is one."""
    if not _PLAIN.match(word):
        return word
    return float(word) if {".", "e"} & set(word) else int(word)


def _wrong_range(key: str, text: str, rule: str) -> PlannerError:
    return PlannerError(rule, value=f"{key}={text}", remedy=f"write {key}=0.25x:4x or {key}=10:80", key="vary")


def grid(vary: Mapping[str, Sequence[Value]]) -> list[tuple[Value, ...]]:
    """Every combination, the last key's values the fastest."""
    return list(itertools.product(*vary.values()))
