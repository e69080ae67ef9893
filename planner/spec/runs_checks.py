"""Whether a run can be judged: its model, cluster, workload and layout are what an estimate takes."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

from planner.errors import PlannerError
from planner.spec.legality import violations
from planner.spec.model import ModelSpec
from planner.spec.runs import Run
from planner.spec.strategy import Strategy
from planner.spec.workload import workload_from_dict

# Rows of the published collection that contradict their siblings, by id and step time (or memory) so that no
# other table's ids are meant: why they are not judged.
_FAR_OFF = "far too fast or slow beside its siblings"
_REPEAT = "a repeat that lies far from its siblings"
_TWINS = "differs up to 1.77 times from a row of equal columns"
_DOUBTED: dict[tuple[str, float], str] = {
    ("T0647", 34.168): _FAR_OFF,
    ("T0648", 34.194): _FAR_OFF,
    ("T0649", 34.274): _FAR_OFF,
    ("T0480", 24.8478): _FAR_OFF,
    ("T0444", 51.2701): _TWINS,
    ("T0407", 28.9406): _TWINS,
    ("T0410", 49.5734): _FAR_OFF,
    ("T0447", 48.7075): _FAR_OFF,
    ("T1294", 147.41): _REPEAT,
    ("T1297", 153.9): _REPEAT,
    ("T1299", 156.84): _REPEAT,
    ("T1265", 162.72): _REPEAT,
    ("T1302", 137.53): _REPEAT,
}
_DOUBTED_MEMORY: frozenset[tuple[str, float]] = frozenset(
    {("T1249", 137.34), ("T1242", 141.41), ("T1123", 1.4979), ("T1124", 1.5237), ("T1153", 1.2074),
     ("T1154", 1.0416)}
)  # fmt: skip


def checked(run: Run) -> Run:
    """The run, with the reason why it is not judged where there is one."""
    if run.excluded:
        return run
    key = (run.id, run.step_seconds or 0.0)
    if key in _DOUBTED_MEMORY:
        run = replace(run, memory=None)
    if run.trust == "D":
        return replace(run, excluded="trust D: unusable")
    if key in _DOUBTED:
        return replace(run, excluded=f"doubted: {_DOUBTED[key]}")
    if not run.step_seconds and run.memory is None:
        return replace(run, excluded="neither a step time nor memory is given")
    return replace(run, excluded=_broken_rule(run))


def _broken_rule(run: Run) -> str:
    """The first rule that keeps the run from being estimated, or nothing."""
    try:
        model = _spec(json.dumps(run.model, sort_keys=True))
        workload = workload_from_dict(run.workload, model=model)
        strategy = Strategy.from_dict(run.strategy, gpus=run.gpus)
    except PlannerError as error:
        return f"{error.rule} ({error.key}: {error.value})"
    found = violations(model, workload, strategy, run.gpus)
    return f"{found[0].rule} ({found[0].key}: {found[0].value})" if found else ""


@functools.cache
def _spec(data: str) -> ModelSpec:
    return ModelSpec.from_dict(json.loads(data))
