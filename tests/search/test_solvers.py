"""Both solvers against brute force on set packings with a knapsack, the shape of a block's program."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys

import pulp
import pytest

from planner.search.solvers import Solver, solve


def packing(draw: random.Random, count: int) -> tuple[list[float], list[float], float]:
    """What each of some neighbours gains and frees, and how much must be freed."""
    gains = [draw.uniform(-1.0, 4.0) for _ in range(count)]
    freed = [draw.uniform(1.0, 8.0) for _ in range(count)]
    return gains, freed, draw.uniform(0.0, sum(freed) / 2)


def problem_of(gains: list[float], freed: list[float], needed: float) -> pulp.LpProblem:
    problem = pulp.LpProblem("packing", pulp.LpMinimize)
    chosen = [problem.add_variable(f"y_{place}", cat=pulp.LpBinary) for place in range(len(gains))]
    problem += pulp.lpSum(gain * y for gain, y in zip(gains, chosen, strict=True))
    for one, other in itertools.pairwise(chosen):
        either = problem.add_variable(f"x_{one.name}", cat=pulp.LpBinary)
        problem += either == one + other
    problem += pulp.lpSum(size * y for size, y in zip(freed, chosen, strict=True)) >= needed
    return problem


def least(gains: list[float], freed: list[float], needed: float) -> float:
    """By every subset without neighbours."""
    found = math.inf
    for mask in range(1 << len(gains)):
        places = [place for place in range(len(gains)) if mask >> place & 1]
        if not mask & mask << 1 and sum(freed[place] for place in places) >= needed:
            found = min(found, sum(gains[place] for place in places))
    return found


@pytest.mark.parametrize(("solver", "instances"), [("highs", 120), ("cbc", 25)])
def test_the_least_of_all_subsets(solver: Solver, instances: int) -> None:
    draw, infeasible = random.Random(7), 0
    for _ in range(instances):
        given = packing(draw, draw.randrange(3, 12))
        wanted, solution = least(*given), solve(problem_of(*given), solver)
        assert solution.feasible == math.isfinite(wanted)
        infeasible += not solution.feasible
        if solution.feasible:
            assert solution.proven
            assert solution.objective == pytest.approx(wanted, rel=1e-9, abs=1e-9)
            assert solution.bound == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert infeasible < instances


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_nothing_fits(solver: Solver) -> None:
    solution = solve(problem_of([1.0, 2.0], [1.0, 1.0], 3.0), solver)
    assert not solution.feasible
    assert solution.bound == math.inf


@pytest.mark.parametrize("solver", ["highs", "cbc"])
def test_without_integers(solver: Solver) -> None:
    problem = pulp.LpProblem("plain", pulp.LpMinimize)
    x = problem.add_variable("x", 0, 4)
    problem += 3 * x
    problem += x >= 1.5
    solution = solve(problem, solver)
    assert solution.objective == solution.bound == 4.5
    assert solution.proven


def test_the_solver_is_silent() -> None:
    """Standard output is the answer's alone: what a solver prints there would spoil --json."""
    program = """
import pulp
from planner.search.solvers import solve
problem = pulp.LpProblem("one")
chosen = problem.add_variable("chosen", lowBound=0, cat=pulp.LpInteger)
problem += chosen
problem += 2 * chosen >= 3
solution = solve(problem)
print(solution.objective)
"""
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert told.stdout == "2.0\n"
