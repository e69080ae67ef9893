"""A plan run on this machine."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.api.planning import PlanLike, open_plan, require_same_model
from planner.spec.measured import Measured
from planner.spec.plan import Plan, read_plan
from planner.spec.sources import named_function
from planner.spec.training_run import MEASURED, RankArguments, TrainingRun
from planner.spec.yaml_text import Source


def run(
    plan: PlanLike,
    *,
    nproc: int = 0,
    quiet: bool = True,
    verbose: bool = False,
    use_cache: bool = True,
    **flags: Any,
) -> Measured:
    """Train under a plan, one process per GPU of it, and return what was measured; also kept as measured.json.

    `flags` are called as those of `tp-plan run`: `data, steps, lr, checkpoint, every, resume, …`. A run that
    fails is a PlannerError with exit code 1 that names the rank, its stage and its module. On several machines
    start `torchrun … -m -- planner.execute plan.yaml` yourself.
    """
    from planner.execute.launch import launch

    asked = TrainingRun.from_flags(flags)
    given, source = (plan, Source()) if isinstance(plan, Plan) else read_plan(plan)
    if not isinstance(plan, Plan):
        asked.require_apart(Path(plan))
    if named_function(given.model) is not None and not given.edited:
        require_same_model(given, source, use_cache=use_cache)
    if not isinstance(plan, Plan) and not given.edited:
        return launch(RankArguments(plan=str(plan), run=asked, quiet=quiet, verbose=verbose), nproc)
    # ranks read a file whose figures are those of what it says now
    asked = asked if asked.measured else replace(asked, measured=str(measured_path(plan)))
    current = open_plan(plan, use_cache=use_cache).plan if given.edited else given
    with tempfile.TemporaryDirectory(prefix="tp-plan-run-") as folder:
        path = Path(folder) / "plan.yaml"
        current.sealed().save(path)
        return launch(RankArguments(plan=str(path), run=asked, quiet=quiet, verbose=verbose), nproc)


def measured_path(plan: PlanLike) -> Path:
    """Where a run of a plan keeps what it measured unless told otherwise: beside its file."""
    return (Path.cwd() if isinstance(plan, Plan) else Path(plan).parent) / MEASURED
