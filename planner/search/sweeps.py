"""The best layout at every point of a sweep, each solved for itself: no point decides what another finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from planner.cost.estimates import arranged_estimate
from planner.errors import PlannerError
from planner.search.answers import Answer, Question, answer
from planner.search.arranged import settled
from planner.search.variations import capacity_bytes, varied, with_wishes
from planner.spec.sweep import Sweep, SweepPoint, Value, grid, points_of
from planner.units import GIB

PARETO_POINTS = 12
_MOST_KEYS = 2
_SMALLER = 0.97  # of the memory of one point of a front, that the next may take at most

Told = Callable[[SweepPoint, int], None]  # a point that was solved, and how many there are


def swept(
    question: Question, gpus: int, vary: Mapping[str, Sequence[Any]], *, told: Told = lambda *_: None
) -> Sweep:
    """The best layouts over one parameter, or over two: a map.

    Values are as `spec.sweep.points_of` reads them, keys as `variations.varied` does. An interrupt ends the sweep
    with the points that are solved.
    """
    if not 1 <= len(vary) <= _MOST_KEYS:
        raise PlannerError(
            "one parameter is varied, or two for a map",
            value=", ".join(vary) or "none",
            remedy="give one or two, such as inter_node_bandwidth=0.25x:4x",
            key="vary",
        )
    spread = {key: points_of(key, values) for key, values in vary.items()}
    combinations = grid(spread)
    questions = [varied(question, gpus, dict(zip(spread, values, strict=True))) for values in combinations]
    for _, count in questions:
        question.profile.require_gpus(count)
    points, interrupted, errors = [], False, []
    for values, (changed, count) in zip(combinations, questions, strict=True):
        point = _point(values, changed, count)
        if point is None:
            interrupted = True
            break
        if isinstance(point, PlannerError):
            errors.append(point)
            point = SweepPoint(values=values, gpus=count, reason=point.rule)
        points.append(point)
        told(point, len(combinations))
    if errors and len(errors) == len(combinations):
        raise errors[0]
    return Sweep(
        keys=tuple(spread),
        values=tuple(spread.values()),
        points=tuple(points),
        minimize=question.wishes.minimize,
        interrupted=interrupted,
    )


def pareto(question: Question, gpus: int, *, points: int = PARETO_POINTS, told: Told = lambda *_: None) -> Sweep:
    """Tokens a second and GPU against memory: the limit falls below what each best layout takes, and it is solved
    again, until nothing fits; at least 3 % a point, so that the front has few.

    Its points fall in memory, and no layout with less memory than a point is faster than it by more than those
    3 % of memory buy.
    """
    limit = capacity_bytes(question) / (1.0 - question.wishes.memory_margin)
    found: list[SweepPoint] = []
    interrupted = False
    while len(found) < points:
        allowed = with_wishes(question, max_memory_bytes=limit)
        point = _point((limit / GIB,), allowed, gpus)
        if isinstance(point, PlannerError):
            raise point
        if point is None:
            interrupted = True
            break
        if point.strategy is None:
            break
        found.append(point)
        told(point, points)
        limit = point.memory_high_bytes / (1.0 - question.wishes.memory_margin) * _SMALLER
    return Sweep(
        keys=("max_memory",),
        values=(tuple(point.values[0] for point in found),),
        points=tuple(found),
        minimize=question.wishes.minimize,
        interrupted=interrupted,
    )


def _point(values: tuple[Value, ...], question: Question, gpus: int) -> SweepPoint | PlannerError | None:
    """A point solved; none where an interrupt came, the rule where it cannot be."""
    begun = time.monotonic()
    try:
        found = answer(question, (gpus,))
        limit = question.wishes.time_limit_seconds
        if found.found.interrupted and not (limit and time.monotonic() - begun >= limit):
            return None
        return _told(values, question, found)
    except PlannerError as error:
        return error
    except KeyboardInterrupt:
        return None


def _told(values: tuple[Value, ...], question: Question, given: Answer) -> SweepPoint:
    if not given.found.best:
        legal = len(given.space) > 0
        stopped = given.found.interrupted
        words = "the time was up" if stopped else "nothing fits" if legal else "no layout can run"
        return SweepPoint(values=values, gpus=given.gpus, reason=words)
    arrangement = settled(question.graph, given.found.best[0].arrangement)
    estimate = arranged_estimate(question.graph, question.profile, question.workload, arrangement)
    return SweepPoint(
        values=values,
        gpus=given.gpus,
        strategy=arrangement.strategy,
        step_seconds=estimate.step_seconds,
        objective=given.found.certificate.objective,
        tokens_per_second_per_gpu=estimate.tokens_per_second_per_gpu,
        memory_bytes=estimate.memory_bytes,
        memory_high_bytes=estimate.uncertainty.memory_bytes.high,
        gap=given.found.certificate.gap,
    )
