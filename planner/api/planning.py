"""The best plan and why it is the best; plans of files opened again, and set side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.api.asked import GpusLike, PlanRequest, plan_request
from planner.api.commands import command_of, given_by_keys, hardware_name, model_name, wishes_in
from planner.api.models import trace
from planner.errors import EXIT_ANSWER_IS_NO, PlannerError
from planner.spec.files import read_yaml
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.hardware_sources import HardwareLike, load_hardware
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan, content_digest, read_plan
from planner.spec.sources import ModelLike, resolve_model
from planner.spec.wishes import Fix, Wishes
from planner.spec.workload import TrainWorkload, Workload
from planner.spec.yaml_text import Source

if TYPE_CHECKING:
    from planner.cost.simulate import Timeline
    from planner.report.compare_verdict import Compared
    from planner.search.answers import Question
    from planner.search.optimize import Progress
    from planner.spec.findings import Finding
    from planner.spec.misfit import Misfit

PlanLike = Plan | str | Path

EXPLAINING_SECONDS = 60.0


class NothingFits(PlannerError):  # noqa: N818 - an answer, and no mistake of the user's
    """No layout keeps to what is asked: which limit binds, by how much, and what would fit."""

    exit_code = EXIT_ANSWER_IS_NO

    def __init__(self, misfit: Misfit) -> None:
        super().__init__(misfit.rule, value=misfit.value or None, remedy=misfit.remedy, key=misfit.key)
        self.misfit = misfit

    def __str__(self) -> str:
        return "\n".join(self.misfit.lines)

    def to_dict(self) -> dict[str, Any]:
        """What every error says, and the whole answer."""
        return super().to_dict() | {"value": self.misfit.value, "misfit": self.misfit.to_dict()}


class NothingFound(PlannerError):  # noqa: N818 - as above
    """The search was ended before it came upon any layout that fits."""

    exit_code = EXIT_ANSWER_IS_NO


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedPlan:
    """A plan beside what it was made for, its figures those of what it says now."""

    plan: Plan
    spec: ModelSpec | None
    graph: Graph
    profile: HardwareProfile
    source: Source
    edited: bool  # since it was made: then it was estimated again


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedPlan:
    """A plan, and what solving again around it found out."""

    opened: OpenedPlan
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = [finding.to_dict() for finding in self.findings]
        return {"plan": self.opened.plan.to_dict(), "edited": self.opened.edited, "findings": found}


def plan(
    model: ModelLike,
    hardware: HardwareLike,
    gpus: GpusLike,
    workload: Mapping[str, Any] | Workload | None = None,
    fix: Mapping[str, Any] | str | Fix | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
    use_cache: bool = True,
    **wishes: Any,
) -> Plan:
    """The best plan of a training step on so many GPUs, `64`, or on the best count of `"8..1024"`.

    `fix` holds keys of a strategy, such as `{"tp": 8}`. `wishes` are called as the flags of `tp-plan plan`:
    `max_memory="70GiB", memory_margin, no_recompute, schedule, minimize="time"|"gpus"|"cost", deadline, price,
    time_limit, solver`. A PlannerError with exit code 1 says why nothing fits, and what would.
    """
    request = plan_request(model, hardware, gpus, workload, fix, **wishes)
    return planned(request, progress=progress, use_cache=use_cache)


def planned(
    request: PlanRequest,
    *,
    progress: Callable[[Progress], None] | None = None,
    told: Callable[[str], None] | None = None,
    use_cache: bool = True,
) -> Plan:
    """The answer to a request. An interrupt of the search gives the best plan so far, with its gap.

    `told` hears what is done where that takes a while.
    """
    from planner.search.answers import answer, runners_up
    from planner.search.plans import plan_of

    question = question_of(request.spec, trace(request.found, use_cache=use_cache), request.profile,
                         request.workload, request.wishes)  # fmt: skip
    try:
        answered = answer(question, request.gpus, progress=progress or _unheard)
    except KeyboardInterrupt:
        raise _ended("the search was interrupted") from None
    if not answered.found.best:
        if answered.found.interrupted:
            raise _ended("the search was ended")
        raise _refused(question, request.gpus, told)
    return plan_of(
        model=model_name(request),
        hardware=hardware_name(request),
        graph=question.graph,
        profile=request.profile,
        workload=request.workload,
        arrangement=answered.found.best[0].arrangement,
        command=command_of(request),
        model_digest=_model_digest(request.spec, question.graph),
        hardware_digest=content_digest(request.profile),
        certificate=answered.found.certificate,
        runners_up=runners_up(answered),
        model_spec=request.spec if given_by_keys(request.model) else None,
        hardware_profile=request.profile if given_by_keys(request.hardware) else None,
    )


def open_plan(plan: PlanLike, *, again: bool = False, use_cache: bool = True) -> OpenedPlan:
    """A plan or its file, with model and profile as it was made for. An edited one, or `again`, is estimated anew.

    What a person wrote that cannot run is a PlannerError with file and line, and so are a model or a profile that
    are no longer what they were.
    """
    found, source = (plan, Source()) if isinstance(plan, Plan) else read_plan(plan)
    with _located(source, "model"):
        model = found.model_spec or resolve_model(found.model)
    with _located(source, "hardware"):
        profile = found.hardware_profile or load_hardware(found.hardware)
    spec = model if isinstance(model, ModelSpec) else None
    graph = trace(model, use_cache=use_cache)
    with _located(source, "digests"):
        found.require_same(_model_digest(spec, graph), content_digest(profile))
    edited = found.edited
    if edited or again:
        from planner.search.plans import re_estimated

        found = re_estimated(found, graph, profile, spec=spec, source=source)
    return OpenedPlan(plan=found, spec=spec, graph=graph, profile=profile, source=source, edited=edited)


def require_same_model(plan: Plan, source: Source, *, use_cache: bool = True) -> None:
    """Refuse a plan whose model is no longer what it was made for; of a user's file that takes a trace."""
    with _located(source, "model"):
        model = plan.model_spec or resolve_model(plan.model)
    graph = trace(model, use_cache=use_cache)
    with _located(source, "digests"):
        spec = model if isinstance(model, ModelSpec) else None
        plan.require_same(_model_digest(spec, graph), plan.digests.hardware)


def explain_plan(plan: PlanLike, *, seconds: float = EXPLAINING_SECONDS, use_cache: bool = True) -> ExplainedPlan:
    """Why a plan is the best: what lost, which limit binds, what easing it buys, what flips the choice.

    Each is found by solving again; nothing further is begun after so many seconds, and what was left out is told.
    """
    from planner.search.findings import findings_of

    if not seconds >= 0.0:
        remedy = "give a number of seconds, or leave it out"
        raise PlannerError("a time limit is at least 0 s", value=seconds, remedy=remedy, key="time_limit")
    opened = open_plan(plan, use_cache=use_cache)
    workload = training_of(opened.plan)
    question = question_of(opened.spec, opened.graph, opened.profile, workload, wishes_in(opened.plan.command))
    findings = findings_of(question, opened.plan.gpus, opened.plan, seconds=seconds)
    return ExplainedPlan(opened=opened, findings=findings)


def compare(
    plans: Sequence[PlanLike],
    output: str | Path | None = None,
    *,
    use_cache: bool = True,
    heard: Callable[[PlanLike], None] | None = None,
) -> tuple[Compared, ...]:
    """Plans or their files side by side; with `output`, written as one .html or .png.

    Edited ones are estimated again, and `heard` is told which.
    """
    from planner.report.compare import require_writable_kind, side_by_side, write_comparison
    from planner.report.outputs import require_writable

    if output is not None:
        require_writable_kind(Path(output))
        require_writable(Path(output))
    opened = [open_plan(plan, use_cache=use_cache) for plan in plans]
    for given, one in zip(plans, opened, strict=True):
        if one.edited and heard is not None:
            heard(given)
    drawn = [output is not None and one.plan.strategy.pp > 1 for one in opened]
    timelines = [
        plan_timeline(one).to_dict() if wanted else None for one, wanted in zip(opened, drawn, strict=True)
    ]
    letters = side_by_side([one.plan for one in opened])
    names = [
        letter.name if isinstance(given, Plan) else str(given)
        for given, letter in zip(plans, letters, strict=True)
    ]
    entries = side_by_side([one.plan for one in opened], names, timelines)
    if output is not None:
        write_comparison(entries, Path(output))
    return entries


def plan_timeline(opened: OpenedPlan) -> Timeline:
    """The pipeline of a plan simulated event by event."""
    from planner.cost.training import TrainingCost
    from planner.search.arranged import arrangement_of

    made = arrangement_of(opened.plan, opened.graph, spec=opened.spec, source=opened.source)
    cost = TrainingCost(opened.graph, opened.profile, training_of(opened.plan), made.ways)
    return cost.alone(made.strategy, made.layers, made.ways).timeline()


def is_plan(text: str) -> bool:
    """Whether a word of the command line names a plan's file."""
    if not text.endswith((".yaml", ".yml")) or not Path(text).is_file():
        return False
    data, _ = read_yaml(Path(text))
    return isinstance(data, Mapping) and "model" in data and bool({"version", "hardware"} & set(data))


def question_of(
    spec: ModelSpec | None, graph: Graph, profile: HardwareProfile, workload: TrainWorkload, wishes: Wishes
) -> Question:
    """What the search is asked, but for the number of GPUs."""
    from planner.search.answers import Question

    return Question(spec=spec, graph=graph, profile=profile, workload=workload, wishes=wishes)


def _model_digest(spec: ModelSpec | None, graph: Graph) -> str:
    """Of the spec, or where there is none of the graph, wherever and by whichever torch it was traced."""
    return content_digest(spec if spec is not None else replace(graph, digest="", traced_with=""))


def training_of(plan: Plan) -> TrainWorkload:
    """The work of a plan of training."""
    if not isinstance(plan.workload, TrainWorkload):
        raise PlannerError(
            "only plans of training are priced so far",
            value=plan.workload.mode,
            remedy="give a plan of mode: train",
            key="mode",
        )
    return plan.workload


@contextmanager
def _located(source: Source, key: str) -> Iterator[None]:
    """Errors with the line of a key of the plan's file."""
    try:
        yield
    except PlannerError as error:
        error.where = error.where or source.place((key,))
        raise


def _refused(question: Question, gpus: tuple[int, ...], told: Callable[[str], None] | None) -> PlannerError:
    """Why nothing fits, and the changes that help, as far as they were tried."""
    from planner.search.refusals import why_not

    if told is not None:
        told("nothing fits: solving again for the nearest change with which something does")
    try:
        return NothingFits(why_not(question, gpus))
    except KeyboardInterrupt:
        return NothingFound(
            "no layout fits",
            value="interrupted while looking for a change with which something does",
            remedy="give it time, more GPUs or fewer fixed keys",
            key="memory",
        )


def _ended(how: str) -> NothingFound:
    return NothingFound(
        f"{how} before any layout that fits was found",
        remedy="give it more time, or fewer GPUs or more fixed keys to search",
        key="time_limit",
    )


def _unheard(progress: Progress) -> None:
    """Nobody watches."""
