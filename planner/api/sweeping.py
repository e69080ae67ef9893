"""The best plan at every point of a parameter, or of two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.api.asked import GpusLike, plan_request
from planner.api.commands import wishes_in
from planner.api.models import trace
from planner.api.planning import PlanLike, is_plan, open_plan, question_of, training_of
from planner.errors import PlannerError
from planner.spec.files import write_bytes
from planner.spec.hardware_sources import HardwareLike
from planner.spec.plan import Plan
from planner.spec.sources import ModelLike
from planner.spec.sweep import Sweep, SweepPoint, Value, vary_of
from planner.spec.wishes import Fix
from planner.spec.workload import Workload

if TYPE_CHECKING:
    from planner.search.answers import Question

Vary = Mapping[str, str | Sequence[Value]] | Sequence[str]


def sweep(
    model: ModelLike | PlanLike,
    vary: Vary,
    *,
    hardware: HardwareLike | None = None,
    gpus: GpusLike | None = None,
    workload: Mapping[str, Any] | Workload | None = None,
    fix: Mapping[str, Any] | str | Fix | None = None,
    output: str | Path | None = None,
    told: Callable[[SweepPoint, int], None] | None = None,
    use_cache: bool = True,
    **wishes: Any,
) -> Sweep:
    """The best layout at every point of one parameter, or of two; with `output`, drawn as .png.

    `model` is a plan or its file, that says the rest itself, or what `planner.plan` takes, the rest beside it.
    `vary` is as on the command line, `["inter_node_bandwidth=0.25x:4x"]`, or `{"global_batch": [64, 128]}`; empty,
    the memory of a GPU falls step by step: the front of speed against memory. An interrupt ends the sweep with
    the points that are solved.
    """
    from planner.report.sweep import sweep_png
    from planner.search.sweeps import pareto, swept

    if output is not None:
        _require_picture(Path(output))
    points = vary_of(_texts(vary))
    asked = {"hardware": hardware, "gpus": gpus, "workload": workload, "fix": fix, **wishes}
    question, count = _question(model, {key: value for key, value in asked.items() if value}, use_cache)
    hear = told or _unheard
    found = swept(question, count, points, told=hear) if points else pareto(question, count, told=hear)
    if output is not None:
        write_bytes(Path(output), sweep_png(found))
    return found


def _question(model: ModelLike | PlanLike, asked: dict[str, Any], use_cache: bool) -> tuple[Question, int]:
    """What is solved at each point, before anything is varied."""
    if isinstance(model, Plan) or (isinstance(model, (str, Path)) and is_plan(str(model))):
        if asked:
            raise PlannerError(
                "a plan says itself what it is for",
                value=next(iter(asked)),
                remedy="leave it out, vary it, or give the model in place of the plan",
                key=next(iter(asked)),
            )
        opened = open_plan(model, use_cache=use_cache)
        held = wishes_in(opened.plan.command)
        work = training_of(opened.plan)
        return question_of(opened.spec, opened.graph, opened.profile, work, held), opened.plan.gpus
    for key in ("hardware", "gpus"):
        if not asked.get(key):
            raise PlannerError(f"{key} is needed beside a model", remedy=f"give {key}, or a plan's file", key=key)
    request = plan_request(model, **asked)
    if len(request.gpus) > 1:
        raise PlannerError(
            "each point of a sweep is solved for one count of GPUs",
            value=request.gpus_text,
            remedy=f"vary them: gpus={request.gpus_text.replace('..', ':')}",
            key="gpus",
        )
    graph = trace(request.found, use_cache=use_cache)
    return question_of(request.spec, graph, request.profile, request.workload, request.wishes), request.gpus[0]


def _texts(vary: Vary) -> list[str]:
    """`key=values`, as the command line has them."""
    if not isinstance(vary, Mapping):
        return [vary] if isinstance(vary, str) else list(vary)
    return [
        f"{key}={values if isinstance(values, str) else ','.join(map(str, values))}"
        for key, values in vary.items()
    ]


def _require_picture(output: Path) -> None:
    from planner.report.outputs import require_writable

    if output.suffix.lower() != ".png":
        raise PlannerError(
            "a sweep is drawn as .png", value=str(output), remedy="end the name in .png", key="output"
        )
    require_writable(output)


def _unheard(point: SweepPoint, of: int) -> None:
    """Nobody watches."""
