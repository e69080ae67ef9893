"""After a run: what it measured beside its plan, and a profile refined by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from planner.api.planning import OpenedPlan, PlanLike, is_plan, open_plan, training_of
from planner.errors import PlannerError
from planner.spec.files import require_apart, write_text
from planner.spec.hardware import HardwareProfile
from planner.spec.measured import Measured, context_mismatch, load_measured
from planner.spec.plan import load_plan
from planner.spec.run_comparison import RunComparison
from planner.spec.run_comparison import compare_run as beside
from planner.spec.yaml_text import dump_yaml

if TYPE_CHECKING:
    from planner.cost.refine import Refinement

MeasuredLike = Measured | str | Path


def compare_run(plan: PlanLike, measured: MeasuredLike, *, use_cache: bool = True) -> RunComparison:
    """Where a run's time and memory differ from its plan's. An edited plan is estimated again first."""
    return beside(open_plan(plan, use_cache=use_cache).plan, _measured(measured))


def refine(
    measured: Sequence[MeasuredLike], output: str | Path | None = None, *, name: str = "", use_cache: bool = True
) -> tuple[HardwareProfile, Refinement]:
    """The profile that runs were planned for, its launch costs times the one factor that fits them best.

    The plan of each run stands in the folder of its measurements. Nothing changes where steps do not depend on
    launch costs. With `output` the profile is written there.
    """
    from planner.cost.refine import fitted_factor, with_launch_costs
    from planner.search.plans import re_estimated

    if not measured:
        raise PlannerError("a profile is refined by runs", remedy="give a measured.json", key="from")
    read = {f"measurements {number}": str(run) for number, run in enumerate(measured, 1) if _is_file(run)}
    if output is not None and is_plan(str(output)):
        read["plan"] = str(output)
    require_apart({"output": str(output or "")}, read)
    runs = [(_opened(run, use_cache), _measured(run)) for run in measured]
    first = runs[0][0]
    stack = training_of(first.plan).stack
    for opened, _ in runs:
        if opened.profile != first.profile or training_of(opened.plan).stack != stack:
            raise PlannerError(
                "runs that refine a profile were planned for one profile and software stack",
                value=f"{opened.plan.hardware}, {training_of(opened.plan).stack}",
                remedy="give runs of one profile",
                key="from",
            )
    for run in (run for _, run in runs if run.stack != stack):
        raise PlannerError(
            "launch costs of a software stack are refined by runs of it",
            value=f"planned for stack {stack}, run {run.stack}",
            remedy=f"plan with --stack {run.stack} and run that plan" + " with --compile" * run.compiled,
            key="from",
        )
    for told in filter(None, (context_mismatch(stack, run.context, run.strategy) for _, run in runs)):
        raise PlannerError(
            "launch costs are refined by runs of what their plans predict",
            value=told,
            remedy="run the plan with --context gather",
            key="from",
        )

    def price(factor: float) -> list[float]:
        profile = with_launch_costs(first.profile, stack, factor)
        estimates = (re_estimated(one.plan, one.graph, profile, spec=one.spec).estimate for one, _ in runs)
        return [estimate.step_seconds for estimate in estimates]

    found = fitted_factor(price, [run.step_seconds for _, run in runs])
    reference = _reference([run for _, run in runs], found.factor)
    refined = with_launch_costs(first.profile, stack, found.factor, reference if found.factor != 1.0 else "")
    if name or output:
        refined = replace(refined, name=name or Path(str(output)).stem)
    if output is not None:
        write_text(Path(output), dump_yaml(refined.to_dict()))
    return refined, found


def _reference(runs: Sequence[Measured], factor: float) -> str:
    ends = sorted(run.date for run in runs)
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    return f"launch costs times {factor:.3g}, as the steps of {count} of tp-plan run until {ends[-1]} ask for"


def _is_file(given: MeasuredLike) -> bool:
    return not isinstance(given, Measured)


def _measured(given: MeasuredLike) -> Measured:
    return given if isinstance(given, Measured) else load_measured(given)


def _opened(given: MeasuredLike, use_cache: bool) -> OpenedPlan:
    """The plan of a run: of those beside its file the one with the layout that ran."""
    run = _measured(given)
    if isinstance(given, Measured):
        raise PlannerError(
            "a run is given by its file, beside which its plan stands", remedy="give the path", key="from"
        )
    for path in sorted(Path(given).resolve().parent.glob("*.y*ml")):
        if _layout_of(path) == run.layout:
            return open_plan(path, use_cache=use_cache)
    raise PlannerError(
        "the plan of a run stands beside its measurements",
        value=f"no plan of layout {run.layout[:12]}… beside {given}",
        remedy="put the plan that ran into the same folder",
        key="from",
    )


def _layout_of(path: Path) -> str:
    """The digest of a plan's layout; of a file that is no sound plan none."""
    try:
        return load_plan(path).layout_digest if is_plan(str(path)) else ""
    except PlannerError:
        return ""
