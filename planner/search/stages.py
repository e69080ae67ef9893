"""The stages of one candidate by integer program: how many layers each holds, so that the step is shortest.

y[s, a] = 1 where stage s holds stretch a of the layers. Every stretch comes with the cheapest mix of recomputation
that fits, its forward f and backward b, the exposed exchanges g and r at either end of a step, its optimizer o.

    minimise  Z + O
    one stretch a stage, together all layers ............................................. _whole_model
    O ≥ Σ_a o[s, a]·y[s, a]                                                   for each s .. _optimizer
    start_s ≥ g_s,  start_s ≥ start_{s−1} + f_{s−1} + hop;  finish_s likewise of r and b
    Z ≥ start_s + m·(f_s + b_s) + finish_s                                    for each s .. _waiting
    gpipe:  Z ≥ Σ f + Σ b + (m − 1)(max f + max b) + 2 Σ hop ............................ _gpipe
    1f1b:   Z ≥ Σ_{j<s} (t_j + 2 hop) + m·t_s + R_s − (p−1−s)·f_s, or b_s, or both and twice R_s;
            R_s = Σ_{j>s} (t_j + 2 hop); likewise rounds to the last stage    for each s .. _circling
            Z ≥ Σ α_s f_s + Σ β_s b_s + γ·hop      for paths (α, β, γ) through the schedule add_path

1f1b has too many paths to state. The flush of a solution is the longest of them; where it is longer than Z, its
path becomes a constraint and the program is solved again, until both agree. Then no other stages are better.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pulp

from planner.cost.layouts import Floats
from planner.cost.schedule import flush
from planner.search.borders import Borders
from planner.search.solvers import Solver, solve
from planner.search.stretches import Stretch
from planner.spec.strategy import Schedule

_SCALE = 1e3  # of a usual step in the program: a solver's tolerance of 1e-9 is then 1e-12 of it
_FAR = 1e3  # usual steps; a limit beyond them limits nothing, and would only spoil the numbers
_AGREES = 1e-10  # of a step, below which program and cost model say the same
_TOLERATED = 1e-7  # of a step, by which a solver may undercut constraints that it calls satisfied
_NUDGE = 1e-7  # of a stage's seconds, so that one path alone is the longest
_ROUNDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Layers that a stage may hold, under one candidate."""

    first: int  # -1 where only how many of each kind counts
    layers: int
    forward: float
    backward: float
    gather: float  # exposed, if the rank did not wait for others
    reduce: float
    optimizer: float  # with the copies around exchanges
    held: tuple[int, ...] = ()  # layers of each kind, where equal ones stand together and there are several kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProblem:
    """One candidate's pipeline: the pieces that each stage may hold."""

    schedule: Schedule
    pieces: tuple[tuple[Piece, ...], ...]
    layers: int
    microbatches: int
    hop: float
    host: float
    kinds: tuple[int, ...] = ()  # layers of each kind, where equal ones stand together


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSolution:
    """The best stages, or none below the limit; `bound` is below every step that these pieces can make."""

    layers: tuple[int, ...] | None
    seconds: float
    bound: float


def problem_of(borders: Borders, candidate: int) -> StageProblem:
    """The pipeline of one candidate of a table."""
    table, pipelines = borders.table, borders.pipelines
    return StageProblem(
        schedule=pipelines.schedule,
        pieces=tuple(
            tuple(_piece(stretch, candidate) for stretch in found if stretch.option.fits[candidate])
            for found in borders.stretches
        ),
        layers=borders.chain.layers,
        microbatches=int(table.layouts.microbatches[candidate]),
        hop=float(table.hop[candidate]),
        host=pipelines.host,
        kinds=tuple(Counter(borders.chain.kinds).values()),
    )


def _piece(stretch: Stretch, candidate: int) -> Piece:
    return Piece(
        first=-1 if stretch.held else stretch.firsts[0],
        held=stretch.held,
        layers=stretch.layers,
        forward=float(stretch.option.ahead[0, candidate]),
        backward=float(stretch.option.back[0, candidate]),
        gather=float(stretch.gather[candidate]),
        reduce=float(stretch.reduce[candidate]),
        optimizer=float(stretch.optimizer[candidate]),
    )


def solve_stages(
    problem: StageProblem, limit_seconds: float, solver: Solver = "highs", *, tolerance: float = _AGREES
) -> StageSolution:
    """The shortest step, or none where no step is shorter than the limit, which may be infinite.

    With a tolerance no step is shorter than that share below the one returned.
    """
    if not all(problem.pieces):
        return StageSolution(layers=None, seconds=limit_seconds, bound=limit_seconds)
    program = _Program(problem, limit_seconds)
    best: tuple[float, tuple[int, ...] | None] = (limit_seconds, None)
    bound = 0.0
    for _ in range(_ROUNDS):
        found = solve(program.problem, solver, gap=tolerance / 2 if tolerance > _AGREES else 0.0)
        if not found.feasible:
            bound = best[0]
            break
        chosen = program.chosen()
        seconds = problem_seconds(problem, chosen)
        if seconds < best[0]:
            best = seconds, tuple(piece.layers for piece in chosen)
        bound = found.bound / program.unit + problem.host
        if bound >= best[0] * (1.0 - _AGREES):
            bound = best[0]
            break
        if bound >= best[0] * (1.0 - tolerance) or not program.add_path(chosen):
            break
    if tolerance <= _AGREES and bound >= best[0] * (1.0 - _TOLERATED):
        bound = best[0]
    return StageSolution(layers=best[1], seconds=best[0], bound=bound)


def problem_seconds(problem: StageProblem, chosen: Sequence[Piece]) -> float:
    """The cost model's step of chosen pieces."""
    ahead, back = np.array([[p.forward for p in chosen], [p.backward for p in chosen]])
    pipeline = _flushed(problem, ahead, back)
    start, finish, longest = chosen[0].gather, chosen[0].reduce, 0.0
    for place, piece in enumerate(chosen):
        if place:
            start = max(start + ahead[place - 1] + problem.hop, piece.gather)
            finish = max(finish + back[place - 1] + problem.hop, piece.reduce)
        longest = max(longest, start + problem.microbatches * (ahead[place] + back[place]) + finish)
    return max(pipeline, longest) + max(piece.optimizer for piece in chosen) + problem.host


def _flushed(problem: StageProblem, ahead: Floats, back: Floats, hop: float | None = None) -> float:
    found = flush(
        problem.schedule,
        ahead,
        back,
        microbatches=problem.microbatches,
        pp=len(ahead),
        hop_seconds=problem.hop if hop is None else hop,
    )
    return float(found.seconds)


def _usual_seconds(given: StageProblem) -> float:
    """A step with pieces of mean length."""
    both = [piece.forward + piece.backward for pieces in given.pieces for piece in pieces]
    others = [piece.gather + piece.reduce + piece.optimizer for pieces in given.pieces for piece in pieces]
    waits = 2 * given.hop * len(given.pieces)
    return float((given.microbatches + len(given.pieces)) * np.mean(both) + np.mean(others) + waits) or 1.0


class _Program:
    """The integer program, to which paths are added."""

    def __init__(self, given: StageProblem, limit_seconds: float) -> None:
        self.given = given
        self.unit = _SCALE / _usual_seconds(given)  # of a second
        self.problem = pulp.LpProblem("stages", pulp.LpMinimize)
        self.stages = range(len(given.pieces))
        self.y = [
            [self.problem.add_variable(f"y_{stage}_{place}", cat=pulp.LpBinary) for place in range(len(pieces))]
            for stage, pieces in enumerate(given.pieces)
        ]
        self.forward = [self._time(stage, "forward") for stage in self.stages]
        self.backward = [self._time(stage, "backward") for stage in self.stages]
        self.z, self.o = (self.problem.add_variable(name, lowBound=0.0) for name in ("z", "o"))
        limit = (limit_seconds - given.host) * self.unit
        self.problem += self.z + self.o
        if limit < _FAR * _SCALE:
            self.problem += self.z + self.o <= limit
        self._whole_model()
        self._optimizer()
        self._waiting()
        if given.schedule == "gpipe":
            self._gpipe()
        else:
            self._circling()

    def _time(self, stage: int, name: str) -> pulp.LpVariable:
        """What a stage takes, as a variable: paths name it often."""
        variable = self.problem.add_variable(f"{name}_{stage}", lowBound=0.0)
        self.problem += variable == self._sum(stage, lambda piece: getattr(piece, name))
        return variable

    def _sum(self, stage: int, of: Callable[[Piece], float]) -> pulp.LpAffineExpression:
        pieces = self.given.pieces[stage]
        terms = zip(self.y[stage], pieces, strict=True)
        return pulp.lpSum(of(piece) * self.unit * chosen for chosen, piece in terms)

    def _whole_model(self) -> None:
        for chosen in self.y:
            self.problem += pulp.lpSum(chosen) == 1
        given = self.given
        if all(piece.first < 0 for pieces in given.pieces for piece in pieces):
            held = zip(self.y, given.pieces, strict=True)
            each = [piece.layers * y for ys, pieces in held for y, piece in zip(ys, pieces, strict=True)]
            self.problem += pulp.lpSum(each) == given.layers
            self._kinds()
            return
        for stage in self.stages[:-1]:
            ends: dict[int, list[pulp.LpVariable]] = {}
            starts: dict[int, list[pulp.LpVariable]] = {}
            for y, piece in zip(self.y[stage], given.pieces[stage], strict=True):
                ends.setdefault(piece.first + piece.layers, []).append(y)
            for y, piece in zip(self.y[stage + 1], given.pieces[stage + 1], strict=True):
                starts.setdefault(piece.first, []).append(y)
            for border in sorted(ends.keys() | starts.keys()):
                self.problem += pulp.lpSum(ends.get(border, [])) == pulp.lpSum(starts.get(border, []))

    def _kinds(self) -> None:
        """Of each kind as many as there are, and none behind a later kind."""
        given = self.given
        kinds = max((len(piece.held) for pieces in given.pieces for piece in pieces), default=0)
        for kind in range(kinds if kinds > 1 else 0):
            held = zip(self.y, given.pieces, strict=True)
            each = [piece.held[kind] * y for ys, pieces in held for y, piece in zip(ys, pieces, strict=True)]
            self.problem += pulp.lpSum(each) == given.kinds[kind]
            later = 0
            for ys, pieces in zip(self.y, given.pieces, strict=True):
                pairs = list(zip(ys, pieces, strict=True))
                has = pulp.lpSum(y for y, piece in pairs if piece.held[kind])
                self.problem += has + later <= 1
                passed = self.problem.add_variable(
                    f"later_{kind}_{len(self.problem.variables())}", cat=pulp.LpBinary
                )
                self.problem += passed >= later
                self.problem += passed >= pulp.lpSum(y for y, piece in pairs if any(piece.held[kind + 1 :]))
                later = passed

    def _optimizer(self) -> None:
        for stage in self.stages:
            self.problem += self.o >= self._sum(stage, lambda piece: piece.optimizer)

    def _waiting(self) -> None:
        hop = self.given.hop * self.unit
        start = finish = None
        for stage in self.stages:
            gather = self._sum(stage, lambda piece: piece.gather)
            reduce = self._sum(stage, lambda piece: piece.reduce)
            began, ended = (
                self.problem.add_variable(f"{name}_{stage}", lowBound=0.0) for name in ("start", "finish")
            )
            self.problem += began >= gather
            self.problem += ended >= reduce
            if start is not None and finish is not None:
                self.problem += began >= start + self.forward[stage - 1] + hop
                self.problem += ended >= finish + self.backward[stage - 1] + hop
            start, finish = began, ended
            both = self.forward[stage] + self.backward[stage]
            self.problem += self.z >= start + self.given.microbatches * both + finish

    def _gpipe(self) -> None:
        slowest = []
        for name, times in (("forward", self.forward), ("backward", self.backward)):
            most = self.problem.add_variable(f"most_{name}", lowBound=0.0)
            slowest.append(most)
            for stage in self.stages:
                self.problem += most >= times[stage]
        hops = 2 * (len(self.stages) - 1) * self.given.hop * self.unit
        once = pulp.lpSum(self.forward) + pulp.lpSum(self.backward) + hops
        self.problem += self.z >= once + (self.given.microbatches - 1) * pulp.lpSum(slowest)

    def _circling(self) -> None:
        """Paths that go to the last stage and back before a stage's steady work, behind it, or both."""
        given, pp = self.given, len(self.stages)
        hop = given.hop * self.unit
        before: pulp.LpAffineExpression = pulp.LpAffineExpression()
        behind = pulp.lpSum(self.forward) + pulp.lpSum(self.backward) + 2 * (pp - 1) * hop
        for stage in self.stages[:-1]:
            both, ahead = self.forward[stage] + self.backward[stage], pp - 1 - stage
            behind = behind - both - 2 * hop
            if given.microbatches > ahead:
                path = before + given.microbatches * both + behind + 2 * hop
                self.problem += self.z >= path - ahead * self.forward[stage]
                self.problem += self.z >= path - ahead * self.backward[stage]
            if given.microbatches > ahead + 1:
                self.problem += self.z >= path - ahead * both + behind + 2 * hop
                whole, rest = divmod(given.microbatches - ahead - 2, ahead + 1)
                self.problem += self.z >= before + (2 + whole) * (both + behind + 2 * hop) + rest * both
            before = before + both + 2 * hop

    def chosen(self) -> tuple[Piece, ...]:
        """The pieces of the solution."""
        return tuple(
            pieces[int(np.argmax([y.value() or 0.0 for y in ys]))]
            for ys, pieces in zip(self.y, self.given.pieces, strict=True)
        )

    def add_path(self, chosen: Sequence[Piece]) -> bool:
        """The longest path of these pieces as a constraint; false where it says nothing new."""
        if self.given.schedule == "gpipe":
            return False
        ahead, back = np.array([[p.forward for p in chosen], [p.backward for p in chosen]])
        of_ahead, of_back, hops = longest_path(self.given, ahead, back)
        length = of_ahead @ ahead + of_back @ back + hops * self.given.hop
        if length <= ((self.z.value() or 0.0) / self.unit) * (1.0 + _AGREES):
            return False
        times = zip(of_ahead.tolist(), of_back.tolist(), self.forward, self.backward, strict=True)
        self.problem += (
            self.z >= pulp.lpSum(a * f + b * g for a, b, f, g in times) + hops * self.given.hop * self.unit
        )
        return True


def longest_path(given: StageProblem, ahead: Floats, back: Floats) -> tuple[Floats, Floats, float]:
    """How often the longest path through a flush takes each forward, each backward, and a hop.

    A flush is the longest of sums of times. Where one of them alone is the longest, its counts are the flush's
    slopes, whole numbers; stages that tie are nudged apart.
    """
    pp = len(ahead)
    scale = float(np.mean(ahead + back))
    generator = np.random.default_rng(0)
    times = np.concatenate([ahead, back, [given.hop]]) + scale * _NUDGE * generator.random(2 * pp + 1)
    change = scale * _NUDGE * 1e-3
    moved = times + np.concatenate([np.zeros((1, 2 * pp + 1)), np.eye(2 * pp + 1) * change])
    found = flush(
        given.schedule, moved[:, :pp], moved[:, pp : 2 * pp],
        microbatches=given.microbatches, pp=pp, hop_seconds=moved[:, -1],
    ).seconds  # fmt: skip
    counts = np.round((found[1:] - found[0]) / change)
    return counts[:pp], counts[pp : 2 * pp], float(counts[-1])
