"""Stages by integer program against every choice of pieces."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest

from planner.cost.steps import OnceAStep, StageWork, step
from planner.search.stages import Piece, StageProblem, problem_seconds, solve_stages

SCALES = (1e-6, 1e-3, 1.0, 100.0)


def drawn(draw: random.Random, *, ordered: bool) -> StageProblem:
    """A pipeline of two to five stages; what a stage takes grows with its layers, not quite in proportion."""
    stages, layers = draw.randint(2, 5), draw.randint(2, 7)
    scale = draw.choice(SCALES)
    slower = [draw.uniform(0.7, 1.5) for _ in range(layers)]
    ends = [draw.uniform(0.0, 2.0) * (stage in (0, stages - 1)) for stage in range(stages)]
    exchange = draw.choice((0.0, 0.5, 4.0))
    schedule: Literal["gpipe", "1f1b"] = draw.choice(("gpipe", "1f1b"))

    def piece(stage: int, first: int, count: int) -> Piece:
        work = sum(slower[max(first, 0) : max(first, 0) + count]) + ends[stage]
        again = draw.choice((1.0, 1.0, 1.4))
        return Piece(
            first=first,
            layers=count,
            forward=work * scale,
            backward=2 * work * again * scale,
            gather=exchange * draw.random() * (count + 1) * scale,
            reduce=exchange * draw.random() * (count + 1) * scale,
            optimizer=draw.choice((0.0, 0.3)) * count * scale,
        )

    pieces = []
    for stage in range(stages):
        firsts = range(layers + 1) if ordered else (-1,)
        shapes = [
            (first, count)
            for first in (firsts if stage or not ordered else (0,))
            for count in range(layers - max(first, 0) + 1)
            if draw.random() < 0.9 and (not ordered or stage < stages - 1 or first + count == layers)
        ]
        pieces.append(tuple(piece(stage, *shape) for shape in shapes))
    return StageProblem(
        schedule=schedule, pieces=tuple(pieces), layers=layers, microbatches=draw.choice((1, 2, 3, 5, 8, 16)),
        hop=draw.choice((0.0, 0.1, 1.0)) * scale, host=draw.choice((0.0, 0.2)) * scale,
    )  # fmt: skip


def chains(given: StageProblem) -> Iterator[tuple[Piece, ...]]:
    """Pieces of every stage that together are the model."""
    for chosen in itertools.product(*given.pieces):
        ends = list(itertools.accumulate(piece.layers for piece in chosen))
        firsts = [0, *ends[:-1]]
        ordered = all(piece.first in (-1, first) for piece, first in zip(chosen, firsts, strict=True))
        if ends[-1] == given.layers and ordered:
            yield chosen


def seconds_of(given: StageProblem, every: list[tuple[Piece, ...]]) -> Any:
    """The cost model's steps of many chains of pieces, whose exchanges run beside nothing."""

    def rows(name: str) -> Any:
        return np.array([[getattr(piece, name) for piece in chosen] for chosen in every]).T

    nothing = np.zeros((len(given.pieces), len(every)))
    work = StageWork(
        ahead=rows("forward"), back=rows("backward"), weight=nothing, hop=np.full(len(every), given.hop)
    )
    once = OnceAStep(
        reduce=rows("reduce"), gather=rows("gather"), last=nothing, alone=nothing,
        optimizer=rows("optimizer"), overlapped=np.zeros(len(every), dtype=np.bool_),
    )  # fmt: skip
    found = step(
        given.schedule, work, once, rank_of=np.arange(len(given.pieces)),
        microbatches=np.full(len(every), given.microbatches), pp=len(given.pieces), vpp=1,
    )  # fmt: skip
    return found.seconds + given.host


def problems(count: int, seed: int, *, ordered: bool) -> Iterator[tuple[StageProblem, Any, list[Any]]]:
    """Problems that have some chains, and not too many, with the seconds of each."""
    draw = random.Random(seed)
    while count:
        given = drawn(draw, ordered=ordered)
        if math.prod(map(len, given.pieces)) > 40_000:
            continue
        every = list(chains(given))
        if every:
            count -= 1
            yield given, seconds_of(given, every), every


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ordered", [False, True], ids=["any layers", "at their places"])
def test_the_stages_are_the_best_of_all(seed: int, ordered: bool) -> None:
    for given, seconds, every in problems(12, seed, ordered=ordered):
        least = float(seconds.min())
        found = solve_stages(given, least * 10)
        assert found.seconds == pytest.approx(least, rel=1e-9, abs=0)
        assert found.bound == pytest.approx(least, rel=1e-9, abs=0)
        layers = [tuple(piece.layers for piece in chosen) for chosen in every]
        alike = [place for place, other in enumerate(layers) if other == found.layers]
        assert min(seconds[alike]) == pytest.approx(least, rel=1e-9, abs=0)


@pytest.mark.parametrize("ordered", [False, True])
def test_only_steps_below_the_limit_count(ordered: bool) -> None:
    for given, seconds, _ in problems(20, 50, ordered=ordered):
        least = float(seconds.min())
        assert solve_stages(given, least * (1 - 1e-6)).layers is None
        assert solve_stages(given, least * 0.5).layers is None
        assert solve_stages(given, least * (1 + 1e-6)).seconds == pytest.approx(least, rel=1e-9, abs=0)


def test_both_solvers_find_the_same() -> None:
    for given, seconds, _ in problems(12, 60, ordered=True):
        found = solve_stages(given, float(seconds.min()) * 3, "cbc")
        assert found.seconds == pytest.approx(float(seconds.min()), rel=1e-9, abs=0)


def test_nothing_where_no_pieces_are_the_model() -> None:
    [(given, seconds, _)] = problems(1, 70, ordered=False)
    short = tuple(tuple(piece for piece in pieces if piece.layers == 0) for pieces in given.pieces)
    none = StageProblem(
        schedule=given.schedule, pieces=short, layers=given.layers, microbatches=given.microbatches,
        hop=given.hop, host=given.host,
    )  # fmt: skip
    assert solve_stages(none, float(seconds.max()) * 10).layers is None


def test_seconds_are_those_of_the_cost_model() -> None:
    for given, seconds, every in problems(10, 80, ordered=True):
        for place in range(0, len(every), 1 + len(every) // 20):
            assert problem_seconds(given, every[place]) == pytest.approx(seconds[place], rel=1e-12)
