"""What solving again around a plan finds out: who lost, what binds, what easing buys, what flips the choice.

Everything told was solved: a limit is eased, or a parameter scaled, and the best layout then is searched for among
those that beat what is known. A flip is the factor nearest to 1 at which the best degrees are others, found by
halving the interval on a logarithmic scale between a factor where they are and one where they are not: where they
change back and forth in between, it is one of the changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial

from planner.cost.uncertainty import memory_headroom
from planner.cost.ways import Arrangement
from planner.errors import PlannerError
from planner.search.answers import Question, figures, searched
from planner.search.arranged import arrangement_of, settled
from planner.search.objectives import value_of
from planner.search.optimize import Solved
from planner.search.reasons import reason_of
from planner.search.variations import (
    capacity_bytes,
    every_recompute,
    every_schedule,
    limits_recompute,
    limits_schedules,
    released,
    scaled,
    with_more_memory,
    with_wishes,
)
from planner.spec.findings import Finding, FindingKind
from planner.spec.plan import Plan
from planner.spec.strategy import Strategy
from planner.spec.wishes import Fix
from planner.units import GIB, in_binary_bytes

KINDS: tuple[FindingKind, ...] = ("binding", "easing", "flip", "runner_up")

_SECONDS = 60.0
_MOST_RUNNERS_UP = 5
_FULL = 0.02  # of the memory that may be free where it binds
_FURTHER_GIB, _FURTHER_SHARE = 4.0, 0.1
_SHORTER = 1e-9  # share of a step by which a better one is better
_FLIPPED = {
    "inter_node_bandwidth": "inter-node bandwidth", "intra_node_bandwidth": "intra-node bandwidth",
    "memory_bandwidth": "memory bandwidth", "peak_flops": "peak FLOP/s",
}  # fmt: skip
_LARGEST_FACTOR = 4.0
_DIGITS = 1.01  # factors closer than this are one: two digits

_DEGREES = ("tp", "pp", "cp", "dp", "ep")


def findings_of(
    question: Question, gpus: int, plan: Plan, *, seconds: float = _SECONDS,
    kinds: Collection[FindingKind] = KINDS,
) -> tuple[Finding, ...]:  # fmt: skip
    """What explains a plan of a question on so many GPUs; nothing further is begun after `seconds`.

    What was left out then is told as `untried`; other kinds than `kinds` are not looked for. Values are in the
    unit of the question's objective. Where that is the fewest GPUs, a limit eased may leave half of them enough;
    what else is told is of the step on as many.
    """
    around = _Around(with_wishes(question, time_limit_seconds=0.0), gpus, plan, seconds)
    return tuple(around.found(kinds))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """Something that takes a while, and how it is called where no time is left for it."""

    name: str
    find: Callable[[], Iterator[Finding]]
    instead: Finding | None = None


class _Around:
    """Solves again, from a plan."""

    def __init__(self, question: Question, gpus: int, plan: Plan, seconds: float) -> None:
        self.question, self.gpus, self.plan = question, gpus, plan
        self.until = time.monotonic() + seconds
        self.arrangement = arrangement_of(plan, question.graph, spec=question.spec)
        self.figures = figures(question, self.arrangement)
        self.seconds = self.figures.step.total_seconds
        self.degrees = _degrees(plan.strategy)

    def found(self, kinds: Collection[FindingKind]) -> Iterator[Finding]:
        """What can be told at once, then what the most depends on."""
        if "binding" in kinds:
            yield from self._binding()
        better = self._better()
        base = min(self.seconds, better.seconds) if better else self.seconds
        if better and "runner_up" in kinds:
            known = figures(self.question, better.arrangement).step
            text = f"this plan is {reason_of(known, self.figures.step)}"
            strategy = self._strategy(better.arrangement)
            yield self._finding("runner_up", text, self.seconds, better.seconds, strategy=strategy)
        late = []
        steps: dict[FindingKind, Callable[[], Iterator[_Step]]] = {
            "easing": partial(self._easings, base), "flip": self._flips, "runner_up": self._runners_up,
        }  # fmt: skip
        for step in (step for kind, listed in steps.items() if kind in kinds for step in listed()):
            if not self._late():
                yield from step.find()
                continue
            late.append(step.name)
            if step.instead:
                yield step.instead
        if late:
            yield self._finding("untried", ", ".join(late), self.seconds, self.seconds)

    def _late(self) -> bool:
        return time.monotonic() > self.until

    def _value(self, seconds: float) -> float:
        return value_of(self.question.wishes, self.question.workload, self.gpus, seconds)

    def _finding(
        self, kind: FindingKind, text: str, before: float, after: float, *, key: str = "",
        strategy: Strategy | None = None,
    ) -> Finding:  # fmt: skip
        return Finding(
            kind=kind, text=text, key=key, strategy=strategy, before=self._value(before), after=self._value(after)
        )

    def _solved(self, question: Question, below_seconds: float, *, gpus: int = 0) -> Solved | None:
        """The best of a question whose step is below a limit."""
        try:
            best = searched(question, gpus or self.gpus, limit_seconds=below_seconds).found.best
        except PlannerError:
            return None
        return best[0] if best else None

    def _strategy(self, arrangement: Arrangement) -> Strategy:
        return settled(self.question.graph, arrangement).strategy

    def _better(self) -> Solved | None:
        """Of a plan that was given or edited: the best, where it is another."""
        proof = self.plan.certificate
        if proof is not None and proof.gap < _SHORTER and not self.plan.edited:
            return None
        return self._solved(self.question, self.seconds * (1.0 - _SHORTER))

    def _runners_up(self) -> Iterator[_Step]:
        """Each with its degrees held, solved to the end; as the plan has it where there is no time for that."""
        shortest = sorted(self.plan.runners_up, key=lambda other: other.objective)
        for other in shortest[:_MOST_RUNNERS_UP]:
            yield _Step(
                name=f"{other.strategy.label} to the end", find=partial(self._runner_up, other.strategy),
                instead=Finding(
                    kind="runner_up", text=other.reason, before=self._value(self.seconds), after=other.objective,
                    strategy=other.strategy,
                ),
            )  # fmt: skip

    def _runner_up(self, strategy: Strategy) -> Iterator[Finding]:
        fix = {**self.question.wishes.fix.given, **{key: getattr(strategy, key) for key in _DEGREES}}
        best = self._solved(with_wishes(self.question, fix=Fix(**fix)), math.inf)
        if best is not None:
            known = figures(self.question, best.arrangement).step
            text, named = reason_of(self.figures.step, known), self._strategy(best.arrangement)
            yield self._finding("runner_up", text, self.seconds, best.seconds, strategy=named)

    def _binding(self) -> Iterator[Finding]:
        """Stages whose memory is full."""
        capacity = capacity_bytes(self.question)
        headroom = memory_headroom(self.question.graph, self.question.profile, self.question.workload)
        used = [memory.device_bytes * headroom for memory in self.figures.memory]
        full = [stage for stage, size in enumerate(used) if size > (1.0 - _FULL) * capacity]
        if not full:
            return
        stages = (
            f"stage {full[0]}" if len(full) == 1 else f"{len(full)} of {len(used)} stages, {full[0]} the first"
        )
        where = f"memory of {stages}" if len(used) > 1 else "memory of each GPU"
        yield Finding(
            kind="binding", text=f"{where}, the upper end of its interval", before=max(used), after=capacity,
            unit="bytes", key="max_memory",
        )  # fmt: skip

    def _easings(self, base: float) -> Iterator[_Step]:
        """Each limit eased by itself."""
        question, wishes = self.question, self.question.wishes
        fewest = wishes.minimize == "gpus"
        if fewest and (self.gpus % 2 or self._solved(question, self._deadline, gpus=self.gpus // 2)):
            return  # half of them was no answer for another reason than a limit: nobody asked for it
        further = _FURTHER_GIB * GIB
        yield self._easing(
            f"{in_binary_bytes(further)} more memory", "memory", with_more_memory(question, further), base
        )
        share = _FURTHER_SHARE * capacity_bytes(question)
        words = f"{100 * _FURTHER_SHARE:.0f} % more memory"
        yield self._easing(words, "memory", with_more_memory(question, share), base)
        for key, value in wishes.fix.given.items():
            if key != "recompute":
                yield self._easing(f"{key} free, not {value}", f"fix.{key}", released(question, key), base)
        if limits_recompute(question):
            yield self._easing("every recomputation allowed", "recompute", every_recompute(question), base)
        if limits_schedules(question):
            yield self._easing("every schedule allowed", "schedules", every_schedule(question), base)
        if not fewest:
            yield self._twice_the_batch(base)

    def _easing(self, text: str, key: str, question: Question, base: float) -> _Step:
        def find() -> Iterator[Finding]:
            best = self._solved(question, base * (1.0 - _SHORTER))
            after = best.seconds if best else base
            strategy = self._strategy(best.arrangement) if best else None
            yield self._finding("easing", text, base, after, key=key, strategy=strategy)

        def find_fewer() -> Iterator[Finding]:
            half = self.gpus // 2
            best = self._solved(question, self._deadline, gpus=half)
            strategy = self._strategy(best.arrangement) if best else None
            after = float(half if best else self.gpus)
            yield Finding(
                kind="easing", text=text, before=float(self.gpus), after=after, key=key, strategy=strategy
            )

        fewest = question.wishes.minimize == "gpus"
        return _Step(name=text, find=find_fewer if fewest else find)

    @property
    def _deadline(self) -> float:
        return math.nextafter(self.question.wishes.deadline_seconds, math.inf)

    def _twice_the_batch(self, base: float) -> _Step:
        """A longer step of which each token takes less: what a bubble and gradients cost."""
        workload = self.question.workload
        twice = replace(self.question, workload=replace(workload, global_batch=2 * workload.global_batch))

        def find() -> Iterator[Finding]:
            best = self._solved(twice, 2.0 * base * (1.0 - _SHORTER))
            after = best.seconds / 2.0 if best else base
            strategy = self._strategy(best.arrangement) if best else None
            text = "twice the global batch, told for as many tokens"
            yield self._finding("easing", text, base, after, key="global_batch", strategy=strategy)

        return _Step(name="twice the global batch", find=find)

    def _flips(self) -> Iterator[_Step]:
        """Each parameter, up and down."""
        for key, name in _FLIPPED.items():
            if key == "inter_node_bandwidth" and self.gpus <= _node(self.question):
                continue
            try:
                scaled(self.question, key, 1.0)
            except PlannerError:  # a cluster without such a level
                continue
            for factor, words in ((_LARGEST_FACTOR, "more"), (1.0 / _LARGEST_FACTOR, "less")):
                yield _Step(name=f"{words} {name}", find=partial(self._flip, key, name, factor))

    def _flip(self, key: str, name: str, furthest: float) -> Iterator[Finding]:
        """The nearest factor, to two digits on the far side, at which other degrees are better."""
        other = self._other(key, furthest)
        if other is None:
            return
        near, far = 1.0, furthest
        while _apart(near, far) and not self._late():
            for factor in self._guesses(key, other, near, far):
                found = self._other(key, factor)
                if found:
                    far, other = factor, found
                    break
                near = factor
        factor = _two_digits(far, up=furthest > 1.0)
        rounded = self._other(key, factor)
        best, shown = (rounded, factor) if rounded else (other, far)
        yield self._finding(
            "flip", f"{name} × {shown:.3g}", self._own(key, shown), best.seconds, key=key,
            strategy=self._strategy(best.arrangement),
        )  # fmt: skip

    def _guesses(self, key: str, other: Solved, near: float, far: float) -> Iterator[float]:
        """Factors between the two: where the other layout begins to beat the plan, and the middle of what is left.

        First just before it: where nothing else beats the plan there, one further solution settles it.
        """
        low, high = near, far
        while _apart(low, high):
            middle = math.sqrt(low * high)
            scaled_question = scaled(self.question, key, middle)
            theirs = figures(scaled_question, other.arrangement).step.total_seconds
            low, high = (low, middle) if theirs < self._own(key, middle) else (middle, high)
        inside = [factor for factor in (low, high) if _apart(near, factor) and _apart(factor, far)]
        yield from inside
        yield math.sqrt((inside[-1] if inside else near) * far)

    def _own(self, key: str, factor: float) -> float:
        """The plan's step with a parameter scaled."""
        return figures(scaled(self.question, key, factor), self.arrangement).step.total_seconds

    def _other(self, key: str, factor: float) -> Solved | None:
        """The best layout, where its degrees are not the plan's."""
        limit = self._own(key, factor) * (1.0 - _SHORTER)
        best = self._solved(scaled(self.question, key, factor), limit)
        return best if best and _degrees(best.arrangement.strategy) != self.degrees else None


def _degrees(strategy: Strategy) -> tuple[int, ...]:
    return tuple(getattr(strategy, key) for key in _DEGREES)


def _node(question: Question) -> int:
    """GPUs that reach one another without network cards."""
    return max((level.gpus for level in question.profile.topology.values() if level.nics is None), default=1)


def _apart(one: float, other: float) -> bool:
    """Whether two factors differ in two digits."""
    return max(one, other) / min(one, other) > _DIGITS


def _two_digits(factor: float, *, up: bool) -> float:
    """Rounded away from 1."""
    unit = 10.0 ** (math.floor(math.log10(factor)) - 1)
    return (math.ceil(factor / unit - 1e-9) if up else math.floor(factor / unit + 1e-9)) * unit
