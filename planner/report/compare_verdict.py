"""Which of several plans is the fastest, by how much and why; or why nobody can say."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from planner.errors import PlannerError
from planner.report.estimate import _gib as in_gib
from planner.report.estimate import _name as part_name
from planner.report.estimate import _percent as in_percent
from planner.report.estimate import _rate as in_rate
from planner.report.estimate import _scaled as in_unit_of
from planner.report.estimate import _unit as unit_of
from planner.report.plan_words import interval_text, ratio_text
from planner.spec.estimate import Estimate
from planner.spec.plan import Plan
from planner.spec.workload import TrainWorkload

LONGEST_NAME = 26
_EQUAL = 0.005  # of the step
_REASONS = 3  # parts that a verdict names
_WORTH_NAMING = 0.1  # of the difference
_MEASURE = re.compile(r"(?<=\d) (?=(?:s|ms|µs|ns|GiB)\b|%)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A plan under a name, with its pipeline where somebody simulated it."""

    name: str
    plan: Plan
    timeline: Mapping[str, Any] | None = None  # as `Timeline.to_dict()`
    short: str = ""  # the name where room is scarce, like no other one's

    @property
    def estimate(self) -> Estimate:
        """What the plan costs."""
        return self.plan.estimate

    @property
    def missing_bytes(self) -> float:
        """By how much the upper end of the memory exceeds the device; 0 where it fits."""
        known = self.estimate.uncertainty.memory_bytes
        return max(0.0, known.high - self.estimate.capacity_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer in a sentence, and what qualifies it."""

    answer: str
    notes: tuple[str, ...] = ()
    best: int | None = None  # place of the plan that wins


def side_by_side(
    plans: Sequence[Plan],
    names: Sequence[str] | None = None,
    timelines: Sequence[Mapping[str, Any] | None] | None = None,
) -> tuple[Compared, ...]:
    """Plans under names that differ: those given, else letters."""
    if not plans:
        raise PlannerError("at least one plan is compared", value=0, remedy="name plan files", key="plans")
    told = list(names) if names is not None else [_letters(place) for place in range(len(plans))]
    drawn = list(timelines) if timelines is not None else [None] * len(plans)
    for key, given in (("names", told), ("timelines", drawn)):
        if len(given) != len(plans):
            raise PlannerError(
                f"there are {key} for each of the {len(plans)} plans",
                value=len(given),
                remedy=f"give {len(plans)}, or leave {key} out",
                key=key,
            )
    whole = _distinct([_printable(name) for name in told])
    short = _distinct([shortened(name) for name in whole])
    rows = zip(whole, short, plans, drawn, strict=True)
    return tuple(Compared(name=n, short=s, plan=plan, timeline=timeline) for n, s, plan, timeline in rows)


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """A name with its middle left out: what plans are called differs at either end."""
    if len(name) <= longest:
        return name
    tail = (longest - 1) // 2
    return f"{name[: longest - 1 - tail]}…{name[-tail:]}"


def incomparable(entries: Sequence[Compared]) -> str:
    """Why no step is faster than another, or nothing where they can be compared."""
    models = dict.fromkeys(entry.plan.digests.model for entry in entries)
    if len(models) > 1:
        names = dict.fromkeys(entry.plan.model for entry in entries)
        told = ", ".join(shortened(name) for name in names) if len(names) > 1 else "one name, other contents"
        return f"the plans are of different models ({told})"
    if any(entry.plan.workload.mode == "serve" for entry in entries):
        return "serving is weighed by latency and throughput together"
    first, *others = [entry.plan.workload for entry in entries]
    assert isinstance(first, TrainWorkload), "serving was answered above"
    differing = [
        item.name for item in fields(first)
        if any(getattr(other, item.name) != getattr(first, item.name) for other in others)
    ]  # fmt: skip
    if differing:
        values = [f"{key.replace('_', ' ')} {_values(entries, key)}" for key in differing]
        return f"the plans do different work ({'; '.join(values)})"
    return ""


def verdict(entries: Sequence[Compared]) -> Verdict:
    """The fastest plan that fits, and what makes it faster than the next."""
    edited = tuple(
        f"{entry.short} was edited since it was made: its figures are those from before." for entry in entries
        if entry.plan.edited
    )  # fmt: skip
    if len(entries) == 1:
        return Verdict(answer=_alone(entries[0]), notes=edited)
    reason = incomparable(entries)
    if reason:
        best = max(entries, key=lambda entry: entry.estimate.mfu)
        note = f"The highest MFU has {best.short}, {in_percent(best.estimate.mfu, digits=1)}."
        return Verdict(answer=f"No plan is called faster: {reason}.", notes=(note, *edited))
    order = sorted(range(len(entries)), key=lambda place: entries[place].estimate.step_seconds)
    fitting = [place for place in order if entries[place].estimate.fits]
    if not fitting:
        closest = min(entries, key=lambda entry: entry.missing_bytes)
        answer = f"No plan fits: {closest.short} comes closest, {in_gib(closest.missing_bytes)} GiB too much."
        return Verdict(answer=answer, notes=edited)
    best = entries[fitting[0]]
    too_large = [entries[place] for place in order if place not in fitting]
    if len(fitting) == 1:
        step = f"{_step(best.estimate)}, {in_gib(best.estimate.memory_bytes)} of "
        answer = f"Only {best.short} fits: {step}{in_gib(best.estimate.capacity_bytes)} GiB."
        notes: tuple[str, ...] = ()
    else:
        following = entries[fitting[1]]
        answer = _faster(best, following, len(entries))
        notes = _qualified(best, following)
    notes += tuple(_too_large(entry, best) for entry in too_large)
    notes += _per_gpu([entries[place] for place in fitting])
    return Verdict(answer=answer, notes=(*notes, *edited), best=fitting[0])


def unbroken(text: str) -> str:
    """The same with numbers and their units on one line."""
    return _MEASURE.sub("\N{NO-BREAK SPACE}", text)


def reasons(best: Estimate, other: Estimate) -> str:
    """`0.9 s less bubble, 0.2 s more dp exposed`: what most of a difference comes from."""
    total = other.step_seconds
    differences = {key: value - best.breakdown.parts[key] for key, value in other.breakdown.parts.items()}
    whole = abs(total - best.step_seconds)
    ordered = sorted(differences.items(), key=lambda item: -abs(item[1]))
    told = [(key, seconds) for key, seconds in ordered[:_REASONS] if abs(seconds) > _WORTH_NAMING * whole]
    unit = unit_of(total)[1]
    return ", ".join(
        f"{in_unit_of(abs(seconds), total)} {unit} {'less' if seconds > 0 else 'more'} {part_name(key)}"
        for key, seconds in told
    )


def _alone(entry: Compared) -> str:
    found = entry.estimate
    memory = f"{in_gib(found.memory_bytes)} of {in_gib(found.capacity_bytes)} GiB"
    fits = "fits" if found.fits else f"does not fit, up to {in_gib(entry.missing_bytes)} GiB too much"
    return (
        f"{entry.short}: {_step(found)}, {in_rate(found.tokens_per_second_per_gpu)} tokens/s/GPU, MFU "
        f"{in_percent(found.mfu, digits=1)}; {memory}, {fits}."
    )


def _step(found: Estimate) -> str:
    total = found.step_seconds
    interval = interval_text(found.uncertainty.step_seconds, total)
    return f"{in_unit_of(total, total)} {unit_of(total)[1]} a step {interval}"


def _faster(best: Compared, following: Compared, number: int) -> str:
    fast, slow = best.estimate, following.estimate
    ratio = _ratio(slow.step_seconds, fast.step_seconds)
    if ratio < 1.0 + _EQUAL:
        lead = "The two plans" if number == 2 else f"Of {number} plans {best.short} and {following.short}"
        return f"{lead} are equally fast within {100 * _EQUAL:.1f} %: {_step(fast)}."
    gpus = "" if fast.gpus == slow.gpus else f" on {fast.gpus:,} GPUs against {slow.gpus:,}"
    words = f"{ratio_text(ratio)} faster than {following.short}{gpus}: {reasons(fast, slow)}."
    return f"{best.short} is {words}" if number == 2 else f"{best.short} is the fastest of {number}, {words}"


def _ratio(slow: float, fast: float) -> float:
    """How many times as long; a step that takes no time, which only a person writes, counts as a nanosecond."""
    return max(slow, 1e-9) / max(fast, 1e-9)


def _qualified(best: Compared, following: Compared) -> tuple[str, ...]:
    fast, slow = best.estimate, following.estimate
    reach = fast.uncertainty.step_seconds.high
    if fast.step_seconds * (1.0 + _EQUAL) < slow.step_seconds < reach:
        interval = interval_text(fast.uncertainty.step_seconds, fast.step_seconds)
        return (f"The difference is smaller than the interval of the estimate, {interval}.",)
    return ()


def _too_large(entry: Compared, best: Compared) -> str:
    total, fastest = entry.estimate.step_seconds, best.estimate.step_seconds
    pace = f"{ratio_text(_ratio(fastest, total))} faster, but" if total < fastest * (1.0 - _EQUAL) else "left out:"
    return f"{entry.short} is {pace} up to {in_gib(entry.missing_bytes)} GiB too large for its GPUs."


def _per_gpu(fitting: Sequence[Compared]) -> tuple[str, ...]:
    if len({entry.plan.gpus for entry in fitting}) < 2:
        return ()
    best = max(fitting, key=lambda entry: entry.estimate.tokens_per_second_per_gpu)
    rate = in_rate(best.estimate.tokens_per_second_per_gpu)
    return (f"The most tokens/s/GPU has {best.short}, {rate} on {best.plan.gpus:,} GPUs.",)


def _values(entries: Sequence[Compared], key: str) -> str:
    found = dict.fromkeys(getattr(entry.plan.workload, key) for entry in entries)
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in found)


def _letters(place: int) -> str:
    """A, B, …, Z, AA, AB, …"""
    before, letter = divmod(place, 26)
    return (_letters(before - 1) if before else "") + string.ascii_uppercase[letter]


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "�" for character in name) or "plan"


def _distinct(names: Sequence[str]) -> list[str]:
    """Names as they are, with a number behind those that were there before."""
    taken: set[str] = set()
    found = []
    for name in names:
        number, unique = 1, name
        while unique in taken:
            number += 1
            unique = f"{name} ({number})"
        taken.add(unique)
        found.append(unique)
    return found
