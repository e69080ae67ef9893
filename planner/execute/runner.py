"""A plan that runs: this rank's part of a model, and the step that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.errors import PlannerError
from planner.execute.adapters import drawn_source, is_known, spec_of, stage_of
from planner.execute.apply import Applied, apply_strategy
from planner.execute.batches import microbatches_of
from planner.execute.compiled import require_compilable
from planner.execute.gradients import TiedEnds, clip_gradients, divide, synchronise
from planner.execute.mesh import Meshes, build_meshes
from planner.execute.objective import LossFunction, Objective
from planner.execute.parameters import Summed
from planner.execute.pipeline import Pipeline
from planner.execute.placement import places_of
from planner.execute.ring import require_context, require_ring_kernel
from planner.execute.seeds import seed_rank
from planner.execute.step import run_step
from planner.execute.weights import Source, copied_from, fill
from planner.models.build import build_model
from planner.spec.legality import require_legal
from planner.spec.model import ModelSpec
from planner.spec.plan import Plan
from planner.spec.workload import Context, TrainWorkload


class Runner:
    """One rank of a plan. `module` has its parts of the weights, at the paths of the unsplit model.

    `step` leaves gradients in `parameters()`, which an optimizer of the caller's reads; it adds to what is there,
    as backward does.
    """

    def __init__(
        self,
        plan: Plan,
        workload: TrainWorkload,
        meshes: Meshes,
        stages: dict[int, Applied],
        objective: Objective,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.plan = plan
        self.workload = workload
        self.meshes = meshes
        self.stages = stages  # by the number of the virtual stage
        self.applied = tuple(stages.values())
        self.device = device
        self.dtype = dtype
        self.module: nn.Module = together([applied.stage for applied in self.applied])
        self.objective = objective
        self.tied = tied_ends(stages, meshes)
        self.pipeline: Pipeline | None = None
        if meshes.strategy.pp > 1:
            self.pipeline = Pipeline(
                stages,
                meshes,
                objective,
                microbatches=meshes.strategy.microbatches(workload.global_batch),
                length=workload.seq_len,
                device=device,
                dtype=dtype if dtype == torch.float64 else self.applied[0].compute_dtype,
            )

    def step(self, batch: Any) -> Tensor:
        """Forward and backward of all microbatches; the mean loss over the tokens of all ranks, on every rank.

        `batch` is this dp rank's global_batch/dp sequences, the same on its tp, cp and pp peers: a dict with
        tokens (or input_ids) and labels, or a pair of them. Labels are shifted already, but for a Hugging Face
        model, which takes the tokens themselves for labels; −100 does not count.
        """
        shifts = self.applied[0].stage.shifts_labels
        microbatches = microbatches_of(batch, self.workload, self.meshes, self.device, shifts=shifts)
        if self.objective.function is None and microbatches[0].labels is None:
            raise PlannerError(
                "without a loss function a step needs labels",
                value="a batch without labels",
                remedy="give labels, or pass loss_fn to parallelize",
                key="batch",
            )
        with self._added_to_earlier():
            if self.pipeline is None:
                return run_step(self.applied[0], microbatches, objective=self.objective)
            return self._run_pipeline(self.pipeline, microbatches)

    def clip(self, greatest_norm: float) -> Tensor:
        """Scale gradients so that their norm over the whole model is at most this; the norm as it was."""
        return clip_gradients(
            self.module, self.meshes, self._summed(), greatest_norm, tied=self.tied, dtype=self.dtype
        )

    def start_drawing(self, seed: int) -> None:
        """Start the random numbers of dropout: those of ranks differ where what they drop does."""
        seed_rank(seed, self.meshes)

    def followed(self) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...]]]:
        """Modules whose paths are those of the model, each with its blocks, which may be compiled."""
        for applied in self.applied:
            yield applied.stage, tuple(applied.stage.blocks.values())

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parts of the weights."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same with the paths of the unsplit model."""
        return self.module.named_parameters()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        self.module.zero_grad(set_to_none=True)

    def _summed(self) -> list[Summed]:
        return [entry for applied in self.applied for entry in applied.summed]

    @contextmanager
    def _added_to_earlier(self) -> Iterator[None]:
        """Gradients of earlier steps are set aside: this one's are divided and summed when it ends."""
        kept = [(parameter, parameter.grad) for parameter in self.parameters() if parameter.grad is not None]
        self.zero_grad()
        yield
        for parameter, grad in kept:
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    def _run_pipeline(self, pipeline: Pipeline, microbatches: Any) -> Tensor:
        self.objective.begin(self.applied, microbatches)
        for applied in self.applied:
            applied.sharding.before_backward(last=False)
        pipeline.run(microbatches)
        for applied in self.applied:
            applied.sharding.finish()
        synchronise(self._summed())
        if self.tied is not None:
            self.tied.synchronise()
        mean = self.objective.finish(self.applied)
        if mean.divisor is not None:
            divide(self.module, mean.divisor)
        return mean.loss


def parallelize(
    model: nn.Module,
    plan: Plan,
    *,
    loss_fn: LossFunction | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    weights: Source | None = None,
    example: Callable[[int, int], Mapping[str, Any]] | None = None,
    compile: bool = False,  # noqa: A002 - as the flag is called
    context: Context = "gather",
) -> Runner:
    """Spread a whole model over the ranks of the running world as its plan says.

    A model that has values keeps them; one on the meta device gets values that follow from each weight's path
    and the seed, whatever the layout. `weights` gives others by path. The model itself is left as it was. Under tp
    and pp a module of one's own first runs on its `example`, shapes alone. With `compile` torch.compile makes
    kernels of each block, when the first step runs it. Under cp ranks gather the keys and values of a sequence, or
    pass them around a `context` of "ring".
    """
    if not is_known(model):
        from planner.execute.own_module import OwnRunner  # which is a runner

        return OwnRunner.of(model, plan, loss_fn, device, seed, weights, example, compiled=compile)
    workload = _require_fitting(model, plan)
    if compile:
        require_compilable(plan, spec_of(model))
    parameters = list(model.parameters())
    dtype = parameters[0].dtype
    on_meta = any(parameter.is_meta for parameter in parameters)
    source = weights or (drawn_source(model, seed) if on_meta else copied_from(model))
    place = torch.device(device) if device is not None else usual_device(parameters[0])
    spec = spec_of(model)
    require_context(context, spec, plan.strategy, workload.seq_len)
    precision = "fp64" if dtype == torch.float64 else workload.precision
    require_ring_kernel(context, plan.strategy, precision, place.type)
    meshes = build_meshes(
        plan.strategy,
        device_type=place.type,
        kv_heads=spec.kv_heads,
        experts=spec.moe is not None,
        tied=spec.tied_embeddings,
        places=places_of(plan),
    )
    stages = _stages(model, plan, workload, meshes, source, place, dtype, compile, context)
    return Runner(plan, workload, meshes, stages, Objective(loss_fn), place, dtype)


def build_runner(
    plan: Plan,
    spec: ModelSpec,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    weights: Source | None = None,
    compile: bool = False,  # noqa: A002 - as the flag is called
    context: Context = "gather",
) -> Runner:
    """The same from a specification alone: no rank ever holds the whole model."""
    model = build_model(spec, device="meta", dtype=dtype)
    return parallelize(model, plan, device=device, seed=seed, weights=weights, compile=compile, context=context)


def together(stages: list[Any]) -> nn.Module:
    """Modules as one that has all their submodules at the same paths."""
    if len(stages) == 1:
        only: nn.Module = stages[0]
        return only
    whole = nn.Module()
    names = dict.fromkeys(name for stage in stages for name, _ in stage.named_children())
    for name in names:
        whole.add_module(name, together([getattr(each, name) for each in stages if getattr(each, name, None)]))
    return whole


def _stages(
    model: nn.Module,
    plan: Plan,
    workload: TrainWorkload,
    meshes: Meshes,
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    context: Context,
) -> dict[int, Applied]:
    """This rank's virtual stages: split and sharded without memory, then filled."""
    found: dict[int, Applied] = {}
    spans = plan.virtual_stages()
    for number, (rank, _, layers) in enumerate(spans):
        if rank != meshes.pp_rank:
            continue
        stage = stage_of(model, layers, first=number == 0, last=number == len(spans) - 1, dtype=dtype)
        recompute = {f"blocks.{layer}": plan.recompute_of(f"blocks.{layer}") for layer in stage.blocks}
        found[number] = apply_strategy(
            stage,
            plan.modules,
            meshes,
            recompute=recompute,
            precision=workload.precision,
            compiled=compiled,
            context=context,
        )
        fill(stage, source, device)
    return found


def tied_ends(stages: dict[int, Applied], meshes: Meshes) -> TiedEnds | None:
    """The copies of a table that is tied across stages, where this rank has one or both."""
    if meshes.strategy.pp == 1:
        return None
    here = []
    for applied in stages.values():
        stage = applied.stage
        if not stage.spec.tied_embeddings:
            return None
        if stage.embedding is not None:
            here.append(Summed(stage.embedding.tokens, "weight", meshes.ends))
        if stage.projection is not None:
            here.append(Summed(stage.projection, "weight", meshes.ends))
    return TiedEnds(tuple(here), meshes.ends) if here else None


def require_training(plan: Plan) -> TrainWorkload:
    """What a plan for training trains with, where the ranks know one another."""
    workload = plan.workload
    if not isinstance(workload, TrainWorkload):
        raise PlannerError(
            "a plan for training runs", value=workload.mode, remedy="plan with mode: train", key="mode"
        )
    if not dist.is_initialized():
        raise PlannerError(
            "the ranks of a plan know one another: torch.distributed is initialised",
            value="no process group",
            remedy="start the script with torchrun, and call torch.distributed.init_process_group in it",
        )
    return workload


def _require_fitting(model: nn.Module, plan: Plan) -> TrainWorkload:
    """Everything that would make the plan fail later, said before any work."""
    workload = require_training(plan)
    spec = spec_of(model)
    require_legal(spec, workload, plan.strategy, plan.gpus)
    layers = plan.layer_count
    if layers != spec.layers:
        raise PlannerError(
            f"the stages of the plan hold the {spec.layers} layers of the model",
            value=layers,
            remedy="plan for this model, or give the model of the plan",
            key="stages",
        )
    return workload


def usual_device(parameter: nn.Parameter) -> torch.device:
    """Where the model is; of one on meta the accelerator of this rank where the backend needs one."""
    if not parameter.is_meta:
        return parameter.device
    return (
        torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
    )
