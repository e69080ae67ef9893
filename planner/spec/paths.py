"""Module paths that speak of many layers at once: `layers.0-79.attention.query`, `layers.*.mlp`.

A component is a name, `*`, or numbers and ranges (`0,2,4-7`). The narrowest pattern that matches a path
speaks for it, and of equally narrow ones the last: a line added for one layer overrides those for all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

_NUMBERS = re.compile(r"\d{1,9}(?:-\d{1,9})?(?:,\d{1,9}(?:-\d{1,9})?)*", re.ASCII)
_SPAN = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Span:
    """Whole numbers from first to last, both included. Plain form `3`, `0-79`, or `none`."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __contains__(self, number: int) -> bool:
        return self.first <= number <= self.last

    def to_plain(self) -> int | str:
        """How it stands in a file."""
        if not len(self):
            return "none"
        return self.first if self.first == self.last else f"{self.first}-{self.last}"

    @classmethod
    def from_plain(cls, value: Any) -> Span:
        """The inverse of `to_plain`; ValueError where it is no span."""
        match = _SPAN.fullmatch(str(value)) if type(value) in (int, str) and len(str(value)) < 20 else None
        if match:
            first, last = int(match[1]), int(match[2] or match[1])
            if first <= last:
                return cls(first, last)
        if value == "none":
            return NOTHING
        raise ValueError("a number, a range such as 0-79 that rises, or none is needed")


NOTHING = Span(0, -1)


def breadth(pattern: str, path: str) -> float:
    """How many paths a pattern matches, if it matches this one, else 0."""
    wanted, given = pattern.split("."), path.split(".")
    if len(wanted) != len(given):
        return 0
    each = [_component_breadth(*pair) for pair in zip(wanted, given, strict=True)]
    return math.prod(each) if all(each) else 0  # infinity times nothing is no number


def lookup(table: Mapping[str, T], path: str) -> T | None:
    """What the narrowest matching pattern says, or None."""
    best: T | None = None
    least = math.inf
    for pattern, value in table.items():
        width = breadth(pattern, path)
        if 0 < width <= least:
            best, least = value, width
    return best


def unmatched(patterns: Iterable[str], paths: Collection[str]) -> list[str]:
    """Patterns that match none of the paths."""
    return [pattern for pattern in patterns if not any(breadth(pattern, path) for path in paths)]


def folded(table: Mapping[str, T]) -> dict[str, T]:
    """A table by path as one by pattern: paths that differ in their first number and agree in value are one."""
    groups: dict[tuple[str, str], list[tuple[T, list[int]]]] = {}
    for path, value in table.items():
        before, number, after = _at_first_number(path)
        agreeing = groups.setdefault((before, after), [])
        for known, numbers in agreeing:
            if known == value:
                numbers.extend(number)
                break
        else:
            agreeing.append((value, number))
    return {
        before + _written(numbers) + after: value
        for (before, after), agreeing in groups.items()
        for value, numbers in agreeing
    }


def is_pattern(text: str) -> bool:
    """Whether text is a module path, perhaps with ranges."""
    return all(_is_component(part) for part in text.split("."))


def _is_component(part: str) -> bool:
    if not part or any(character.isspace() for character in part):
        return False
    return not _NUMBERS.fullmatch(part) or all(int(a) <= int(b or a) for a, b in _SPAN.findall(part))


def _component_breadth(wanted: str, given: str) -> float:
    if wanted == given:
        return 1
    if wanted == "*":
        return math.inf
    if not _NUMBERS.fullmatch(wanted) or not re.fullmatch(r"\d{1,9}", given, re.ASCII):
        return 0
    spans = [Span(int(first), int(last or first)) for first, last in _SPAN.findall(wanted)]
    return sum(map(len, spans)) if any(int(given) in span for span in spans) else 0


def _at_first_number(path: str) -> tuple[str, list[int], str]:
    """`layers.3.mlp` → `layers.`, [3], `.mlp`; a path without a number is all in front."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if _SPAN.fullmatch(part) and str(int(part.split("-")[0])) == part:
            before, after = ".".join([*parts[:index], ""]), ".".join(["", *parts[index + 1 :]])
            return before, [int(part)], after
    return path, [], ""


def _written(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → `0-2,5`."""
    runs: list[Span] = []
    for number in sorted(numbers):
        if runs and runs[-1].last == number - 1:
            runs[-1] = Span(runs[-1].first, number)
        else:
            runs.append(Span(number, number))
    return ",".join(str(run.to_plain()) for run in runs)
