"""One function per verb: the only place where rooms meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.api.asked import USUAL_BATCH as USUAL_BATCH
from planner.api.asked import plan_request as plan_request
from planner.api.kernel_times import attention_seconds as attention_seconds
from planner.api.kernel_times import collective_seconds as collective_seconds
from planner.api.kernel_times import gemm_seconds as gemm_seconds
from planner.api.measuring import compare_run as compare_run
from planner.api.measuring import refine as refine
from planner.api.models import explain as explain
from planner.api.models import list_models as list_models
from planner.api.models import trace as trace
from planner.api.models import whole
from planner.api.planning import EXPLAINING_SECONDS as EXPLAINING_SECONDS
from planner.api.planning import compare as compare
from planner.api.planning import explain_plan as explain_plan
from planner.api.planning import is_plan as is_plan
from planner.api.planning import open_plan as open_plan
from planner.api.planning import plan as plan
from planner.api.planning import plan_timeline as plan_timeline
from planner.api.planning import planned as planned
from planner.api.running import measured_path as measured_path
from planner.api.running import run as run
from planner.api.sweeping import sweep as sweep
from planner.api.verifying import verify as verify
from planner.errors import PlannerError
from planner.spec.assignments import require_sequence_parallel
from planner.spec.estimate import Estimate
from planner.spec.files import bundled_names
from planner.spec.graph import Graph
from planner.spec.hardware import HardwareProfile
from planner.spec.hardware_sources import HardwareLike
from planner.spec.hardware_sources import load_hardware as load_hardware
from planner.spec.legality import require_legal
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan, load_plan
from planner.spec.sources import ModelLike, resolve_model
from planner.spec.sources import load_model as load_model
from planner.spec.strategy import Strategy
from planner.spec.workload import TrainWorkload, Workload, workload_from_dict

if TYPE_CHECKING:
    from planner.cost.simulate import Timeline
    from planner.execute.objective import LossFunction
    from planner.execute.runner import Runner
    from planner.measure.run import MeasuredMachine
    from planner.report.accuracy import Validation
    from planner.spec.remedy import Remedy


def list_hardware() -> list[HardwareProfile]:
    """The bundled hardware profiles, by name."""
    return [load_hardware(name) for name in bundled_names("hardware_profiles")]


def profile(
    output: str | Path | None = None,
    *,
    nproc: int = 0,
    device: str = "auto",
    dtypes: Sequence[str] = (),
    quick: bool = False,
    name: str = "",
    against: HardwareLike | None = None,
    peaks: HardwareLike | None = None,
    quiet: bool = True,
) -> MeasuredMachine | None:
    """Measure this machine and write its profile where `output` is given.

    `against` compares with a profile, `peaks` takes peaks from one. Under torchrun rank 0 has the result.
    """
    from planner.cost import attention, collectives, elementwise, gemm
    from planner.measure.fitting import Formulas
    from planner.measure.run import measure_machine

    formulas = Formulas(
        gemm=gemm.gemm_seconds,
        prefill=attention.prefill_seconds,
        backward=attention.backward_seconds,
        decode=attention.decode_seconds,
        elementwise=elementwise.elementwise_seconds,
        collective=collectives.collective_seconds,
    )
    return measure_machine(
        formulas,
        output=Path(output) if output else None,
        nproc=nproc,
        device=device,
        dtypes=dtypes,
        quick=quick,
        name=name,
        against=load_hardware(against) if against else None,
        peaks=load_hardware(peaks) if peaks else None,
        quiet=quiet,
    )


def parallelize(
    model: Any,
    plan: Plan | str | Path,
    *,
    loss_fn: LossFunction | None = None,
    device: Any = None,
    seed: int = 0,
    example: Callable[[int, int], Mapping[str, Any]] | None = None,
    compile: bool = False,  # noqa: A002 - as the flag is called
) -> Runner:
    """A model spread over the ranks of the running world as its plan says; `runner.step(batch)` trains it.

    `loss_fn(output, batch)` gives a sum over tokens and their number; without it the loss is cross-entropy of the
    batch's labels. A model on the meta device gets values drawn by path and seed, whatever the layout. Of a module
    of one's own `example(batch, seq_len)` gives the keyword arguments, which tp and pp need to know; without it,
    that of the file which the plan names is taken. With `compile` each block runs through torch.compile.
    """
    from planner.execute import runner
    from planner.execute.own_file import example_of

    chosen = plan if isinstance(plan, Plan) else load_plan(plan)
    given = example or example_of(chosen)
    return runner.parallelize(
        model, chosen, loss_fn=loss_fn, device=device, seed=seed, example=given, compile=compile
    )


def estimate(
    model: ModelLike,
    hardware: HardwareLike,
    gpus: int,
    workload: Mapping[str, Any] | Workload | None = None,
    strategy: Mapping[str, Any] | Strategy | None = None,
    *,
    use_cache: bool = True,
) -> Estimate:
    """Step time, memory and how sure both are, of one layout of a training step.

    What a workload or strategy leaves out stands at its default; dp follows from `gpus`.
    """
    from planner.cost.estimates import training_estimate

    return training_estimate(*_training_case(model, hardware, gpus, workload, strategy, use_cache))


def timeline(
    model: ModelLike,
    hardware: HardwareLike,
    gpus: int,
    workload: Mapping[str, Any] | Workload | None = None,
    strategy: Mapping[str, Any] | Strategy | None = None,
    *,
    use_cache: bool = True,
) -> Timeline:
    """The pipeline of one layout simulated event by event: what each rank computes, waits for, and idles."""
    from planner.cost.training import TrainingCost

    graph, profile, wanted, layout = _training_case(model, hardware, gpus, workload, strategy, use_cache)
    return TrainingCost(graph, profile, wanted).alone(layout).timeline()


def _training_case(
    model: ModelLike,
    hardware: HardwareLike,
    gpus: int,
    workload: Mapping[str, Any] | Workload | None,
    strategy: Mapping[str, Any] | Strategy | None,
    use_cache: bool,
) -> tuple[Graph, HardwareProfile, TrainWorkload, Strategy]:
    """What is asked, checked; the graph last, for it may take seconds."""
    found, profile = resolve_model(model), load_hardware(hardware)
    spec = found if isinstance(found, ModelSpec) else None
    gpus = whole("gpus", gpus, least=1)
    profile.require_gpus(gpus)
    wanted = workload_from_dict(workload or {}, model=spec)
    if not isinstance(wanted, TrainWorkload):
        raise PlannerError(
            "an estimate is of training so far", value=wanted.mode, remedy="leave mode out", key="mode"
        )
    layout = strategy if isinstance(strategy, Strategy) else Strategy.from_dict(strategy or {}, gpus=gpus)
    require_legal(spec, wanted, layout, gpus)
    graph = trace(found, use_cache=use_cache)
    if layout.sp and graph.own:
        require_sequence_parallel(graph)
    return graph, profile, wanted, layout


def remedies(
    model: ModelLike, hardware: HardwareLike, found: Estimate, *, use_cache: bool = True
) -> tuple[Remedy, ...]:
    """Changes after which an estimate that does not fit would, fewer GPUs first, then the shorter step."""
    from planner.cost import remedies as tried

    asked = resolve_model(model)
    spec = asked if isinstance(asked, ModelSpec) else None
    workload = found.workload
    assert isinstance(workload, TrainWorkload), "an estimate is of training so far"
    graph, profile = trace(asked, use_cache=use_cache), load_hardware(hardware)
    return tried.remedies(spec, graph, profile, workload, found.strategy)


def validate(
    paths: str | Path | Sequence[str | Path],
    *,
    output: str | Path | None = None,
    left_out: str | Path | Mapping[str, float] | None = None,
    quiet: bool = True,
) -> Validation:
    """Estimates beside measured runs, by source; with `output`, pages and pictures in that folder.

    `left_out` holds mean errors of sources, measured with constants that were fitted without them, or names a
    JSON file of them.
    """
    from planner.report.accuracy import judge
    from planner.report.accuracy_pages import prepared, write_report
    from planner.report.accuracy_terminal import watched
    from planner.spec.runs import read_runs
    from planner.spec.runs_predicted import left_out_errors, predicted, remembered

    table = read_runs(paths)
    shares = {} if left_out is None else left_out_errors(left_out, table.sources)
    folder = None if output is None else prepared(Path(output))
    ask = remembered(estimate)
    predictions = [predicted(run, ask) for run in watched(table.runs, quiet=quiet)]
    found = judge(table.files, predictions, shares)
    if folder is not None:
        words = [Path(file).name for file in table.files]
        words += ["--left-out", Path(left_out).name] if isinstance(left_out, (str, Path)) else []
        write_report(found, folder, command=f"tp-plan validate {' '.join(words)} -o FOLDER")
    return found
