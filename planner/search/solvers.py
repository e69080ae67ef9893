"""PuLP's problems solved without gaps, by HiGHS or by CBC, with the bound that the solver proved."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pulp

Solver = Literal["highs", "cbc"]

TOLERANCE = 1e-9
_CBC_BOUND = re.compile(r"^Lower bound:\s+(\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The best objective found, and the least that any solution can have; infinite where there is none."""

    objective: float
    bound: float
    proven: bool  # the solver ended by itself, not by its time

    @property
    def feasible(self) -> bool:
        """Whether there is a solution."""
        return math.isfinite(self.objective)


NONE_FITS = Solution(objective=math.inf, bound=math.inf, proven=True)


def solve(
    problem: pulp.LpProblem, solver: Solver = "highs", *, seconds: float | None = None, gap: float = 0.0
) -> Solution:
    """Minimise; the variables then have their values. One thread and a fixed seed: the same answer each time.

    With a gap HiGHS may stop where no solution is better by more than that share; the bound tells.
    """
    return _with_highs(problem, seconds, gap) if solver == "highs" else _with_cbc(problem, seconds)


def _with_highs(problem: pulp.LpProblem, seconds: float | None, gap: float) -> Solution:
    """Without presolve: that of HiGHS 1.15.1 may call a worse solution optimal.

    It did so in 3 of 1,500 small set packings with continuous variables that only integers can satisfy. Without
    it, or with these variables binary, the answer was that of brute force every time.
    """
    problem.solve(
        pulp.HiGHS(
            msg=False, gapRel=gap, gapAbs=0.0, threads=1, timeLimit=seconds, random_seed=0, presolve="off",
            mip_feasibility_tolerance=TOLERANCE, primal_feasibility_tolerance=TOLERANCE,
        )
    )  # fmt: skip
    model: Any = problem.solverModel
    if pulp.LpStatus[problem.status] != "Optimal":
        return NONE_FITS
    objective = float(model.getObjectiveValue())
    proven = model.modelStatusToString(model.getModelStatus()) == "Optimal"
    whole = any(variable.cat == pulp.LpInteger for variable in problem.variables())
    bound = float(model.getInfo().mip_dual_bound) if whole else objective
    return Solution(objective=objective, bound=min(bound, objective), proven=proven)


def _with_cbc(problem: pulp.LpProblem, seconds: float | None) -> Solution:
    """Without gap: CBC does not tell the bound where it stops for one."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        problem.solve(
            pulp.PULP_CBC_CMD(
                msg=False, gapRel=0.0, gapAbs=0.0, threads=1, timeLimit=seconds, logPath=str(log),
                options=["randomCbcSeed 1", f"primalTolerance {TOLERANCE}", f"integerTolerance {TOLERANCE}"],
            )
        )  # fmt: skip
        text = log.read_text()
    if pulp.LpStatus[problem.status] != "Optimal":
        return NONE_FITS
    objective = float(pulp.value(problem.objective))
    found = _CBC_BOUND.search(text)  # stated only where the search was stopped
    bound = float(found[1]) if found else objective
    return Solution(objective=objective, bound=min(bound, objective), proven=found is None)
