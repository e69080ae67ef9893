"""A user's own module under a plan: layers cut over tensor-parallel ranks, state spread, blocks that run again.

What stands between its layers is the user's code. It runs on parts of tensors where that is exact (`own_splits`);
context and expert parallelism need a model whose attention and experts are known, and are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.errors import PlannerError
from planner.execute.compiled import compile_block, require_compilable
from planner.execute.gradients import TiedEnds, divide, synchronise
from planner.execute.mesh import build_meshes, with_kv_heads
from planner.execute.objective import Objective, require_tokens
from planner.execute.own_batches import (
    dtype_of,
    loss_in,
    meta_inputs,
    microbatches_by_name,
    own_loss,
    with_its_arguments,
)
from planner.execute.own_pipeline import OwnPipeline
from planner.execute.own_splits import OwnSplits, carry, run_on_example, weights_as, whole_output
from planner.execute.own_stage import OwnStage, layers_of, outermost_lists
from planner.execute.parameters import Summed, pieces_of, replace_forward
from planner.execute.phases import phase
from planner.execute.recompute import run_again
from planner.execute.runner import Runner, require_training, usual_device
from planner.execute.seeds import seed_rank
from planner.execute.sharding import DTYPES, Group, shard_groups
from planner.execute.weights import Fill, Source, copied_from, drawn_for, fill_parameters, without_values
from planner.models.user_module import Example
from planner.spec.legality import require_legal
from planner.spec.orders import ONE_STAGE_A_RANK
from planner.spec.paths import Span, unmatched
from planner.spec.plan import Plan
from planner.spec.workload import TrainWorkload

Ties = list[list[tuple[nn.Module, str]]]  # weights that several modules share, each with all its owners
Loss = Callable[[Any, Any], tuple[Tensor, Any]]  # of output and batch: a sum, and over how many

_DEGREES = ("cp", "ep", "vpp")


class OwnRunner(Runner):
    """A rank's copy of a user's module, and one step of it. A batch holds the module's arguments by name."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        workload: TrainWorkload,
        loss_fn: Loss | None,
        device: torch.device,
        fill: Fill,
        example: Example | None,
        *,
        compiled: bool,
    ) -> None:
        self.plan, self.workload, self.device = plan, workload, device
        self.stages, self.applied, self.tied, self.pipeline = {}, (), None, None
        self.dtype = dtype_of(model)
        self.objective = Objective(loss_fn)
        strategy = plan.strategy
        self.meshes = build_meshes(strategy, device_type=device.type, tied=True)
        self.module = without_values(model)
        if loss_fn is not None:
            replace_forward(self.module, with_its_arguments)
        self.summed: list[Summed] = []
        ties = _tied(self.module)
        blocks, self.stage = self._cut_apart(plan, example, compiled=compiled)
        self.blocks = tuple(blocks)
        _tie(ties)
        reshard = strategy.zero == 3 and strategy.pp == 1
        groups = [Group(modules=(block,), reshard=reshard) for block in blocks]
        self.sharding = shard_groups(self.module, groups, self.meshes, workload.precision)
        if strategy.tp > 1:
            carry(blocks)
        shared: list[tuple[nn.Module, str]] = []
        if self.stage is not None:
            self.stage.stop_behind_layers()
            shared = [(owner, name) for owner, name in self.stage.shared if getattr(owner, name).requires_grad]
            self._stand_in(self.stage)
        self._fill(ties, fill)
        self.ends = [Summed(module, name, self.meshes.ends) for module, name in shared]
        if self.ends:
            self.tied = TiedEnds(tuple(self.ends), self.meshes.ends)
        self.total = torch.zeros(2, dtype=torch.float64, device=device)  # the loss, and how many it is of
        self.flow = self._pipeline()

    def _take_memory(self) -> None:
        """Before weights are cut: here they take memory when each rank knows its part."""

    def _fill(self, ties: Ties, fill: Fill) -> None:
        """Values for what this rank has."""
        self.module.to_empty(device=self.device)
        _tie(ties)
        fill(self.module)

    def _stand_in(self, stage: OwnStage) -> None:
        """For weights of other stages, which take no memory."""
        stage.stand_in(self.device, self.sent_dtype)

    def _pipeline(self) -> OwnPipeline | None:
        if self.stage is None:
            return None
        strategy, work = self.plan.strategy, self.workload
        count = strategy.microbatches(work.global_batch)
        return OwnPipeline(self.stage, self.meshes, self.sharding, self._loss, count, self.device, self.sent_dtype)

    @property
    def sent_dtype(self) -> torch.dtype:
        """What sharding casts weights to, and what stages send one another."""
        return self.dtype if self.dtype == torch.float64 else DTYPES[self.workload.precision]

    def _cut_apart(
        self, plan: Plan, example: Example | None, *, compiled: bool
    ) -> tuple[list[nn.Module], OwnStage | None]:
        """Let the module run as the plan says, its weights cut or gone; the blocks left, and the stage."""
        module, strategy = self.module, plan.strategy
        count = plan.layer_count
        blocks = dict(_blocks(module, count))
        splits: OwnSplits | None = None
        stage: OwnStage | None = None
        if strategy.tp > 1:
            splits = OwnSplits(module, plan.modules, self.meshes.tp, [*blocks.values(), module])
        for path, block in blocks.items():
            if compiled:
                compile_block(block)
            _recompute(path, block, plan)
        if strategy.pp > 1:
            spans = plan.virtual_stages()
            layers = layers_of(module, count)
            rank = self.meshes.pp_rank
            before = max((span.last for _, _, span in spans[:rank]), default=-1)
            own = spans[rank][2] or Span(before + 1, before)
            ends = {"is_first": rank == 0, "is_last": rank == len(spans) - 1}
            stage = OwnStage(module, layers, own, self.result_of, **ends)
        if splits is None and stage is None:
            self._take_memory()
            return list(blocks.values()), stage
        inputs = meta_inputs(example, strategy.microbatch, self.workload.seq_len, self.sent_dtype)
        run = partial(run_on_example, module, inputs)
        with weights_as(module, self.sent_dtype), nullcontext() if splits is None else splits.hidden():
            if splits is not None:
                splits.examine(run)
            if stage is not None:
                stage.examine(run)
        if stage is not None:
            stage.keep_own()
            others = {id(layer) for layer in stage.layers.values()}
            others -= {id(layer) for layer in stage.own_layers().values()}
            blocks = {path: block for path, block in blocks.items() if id(block) not in others}
        self._take_memory()
        if splits is not None:
            self.meshes = with_kv_heads(self.meshes, strategy.tp // splits.copies)
            splits.apply(self.meshes.dense["tp"], self.meshes.same_kv_head)
            self.summed = splits.summed
        return list(blocks.values()), stage

    @classmethod
    def of(
        cls,
        model: nn.Module,
        plan: Plan,
        loss_fn: Loss | None,
        device: torch.device | str | None,
        seed: int,
        weights: Source | None,
        example: Example | None,
        *,
        compiled: bool,
        fill: Fill | None = None,
    ) -> OwnRunner:
        """Everything that would make the plan fail later is said before any work.

        With `fill` values come from there, and `model` may have none.
        """
        workload = require_training(plan)
        require_runnable(plan)
        if compiled:
            require_compilable(plan, None)
        require_same_paths(plan, model)
        require_legal(None, workload, plan.strategy, plan.gpus)
        tensors = [*model.parameters(), *model.buffers()]
        on_meta = any(tensor.is_meta for tensor in tensors)
        if on_meta and fill is None and next(model.buffers(), None) is not None:
            raise PlannerError(
                "a module on the meta device has no buffers: their values would be lost",
                value=next(name for name, _ in model.named_buffers()),
                remedy="build the module with values, on the CPU",
                key="model",
            )
        place = torch.device(device) if device is not None else usual_device(next(model.parameters()))
        source = weights or (drawn_for(model, seed) if on_meta else copied_from(model))
        fill = fill or partial(fill_parameters, source=source)
        return cls(model, plan, workload, loss_fn, place, fill, example, compiled=compiled)

    def start_drawing(self, seed: int) -> None:
        """Peers of one tp group draw alike: what each draws for its part alone starts from a number of all."""
        seed_rank(seed, self.meshes, alike=True)

    def followed(self) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...]]]:
        """The module and its blocks."""
        yield self.module, self.blocks

    def step(self, batch: Any) -> Tensor:
        """Gradients of the mean over everything that all ranks count, and that mean.

        What the module's forward does not take of a batch is for the loss function alone, if there is one.
        """
        parts = list(microbatches_by_name(batch, self.workload, self.meshes, self.device))
        with self._added_to_earlier():
            return self._run(parts)

    def _run(self, parts: list[dict[str, Any]]) -> Tensor:
        self.total.zero_()
        if self.flow is not None:
            self.sharding.before_backward(last=False)
            self.flow.run(parts)
        else:
            for number, part in enumerate(parts):
                self.sharding.before_backward(last=number == len(parts) - 1)
                with phase("forward"):
                    out = self.result_of(self.module(**part))
                loss = self._loss(out, part)
                with phase("backward"):
                    torch.autograd.backward(loss)
        self.sharding.finish()
        synchronise([*self.summed, *self.ends])
        total = self.total.clone()
        if self.meshes.tp.rank:
            total.zero_()  # what the first of its peers counts as well
        with phase("metadata"):
            dist.all_reduce(total)
        require_tokens(total[1])
        divide(self.module, total[1])
        return total[0] / total[1]

    def result_of(self, out: Any) -> Any:
        """What a loss reads of what the module returns: its own is there already, and nothing else is gathered."""
        loss = loss_in(out) if self.objective.function is None else None
        return whole_output(out) if loss is None else loss

    def _loss(self, out: Any, part: dict[str, Any]) -> Tensor:
        """What backward of one microbatch starts from; it is counted."""
        function = self.objective.function or own_loss
        loss, count = function(out, part)
        both = (loss.detach(), torch.as_tensor(count, device=self.device))
        self.total += torch.stack([each.double() for each in both])
        return loss

    def _summed(self) -> list[Summed]:
        return self.summed


def require_runnable(plan: Plan) -> None:
    """Refuse axes and schedules that take a model whose parts are known."""
    strategy = plan.strategy
    others = [f"{axis} {getattr(strategy, axis)}" for axis in _DEGREES if getattr(strategy, axis) > 1]
    if strategy.pp > 1 and strategy.schedule not in ONE_STAGE_A_RANK:
        others.append(f"schedule {strategy.schedule}")
    if others:
        raise PlannerError(
            "a module of one's own runs with dp, tp and pp, in the schedules gpipe and 1f1b",
            value=", ".join(others),
            remedy="plan with --fix cp=1,ep=1,vpp=1",
            key="strategy",
        )


def require_same_paths(plan: Plan, model: nn.Module) -> None:
    """A plan for another model names modules that this one does not have."""
    unknown = unmatched(plan.modules, [path for path, _ in model.named_modules()])
    if unknown:
        raise PlannerError(
            "each line of the plan names a module of the model",
            value=unknown[0],
            remedy="give the model that the plan was made for, or plan again",
            key="modules",
        )


def _blocks(model: nn.Module, layers: int) -> Iterator[tuple[str, nn.Module]]:
    """Members of the list of as many as the plan has layers, or of all outermost lists; none where it has none."""
    lists = list(outermost_lists(model)) if layers else []
    of_layers = [(path, found) for path, found in lists if len(found) == layers]
    for path, found in of_layers if len(of_layers) == 1 else lists:
        yield from ((f"{path}.{number}", block) for number, block in found.named_children())


def _recompute(path: str, block: nn.Module, plan: Plan) -> None:
    choice = plan.recompute_of(path)
    if choice == "selective":
        raise PlannerError(
            "of a module of one's own a block is kept, or runs again as a whole",
            value=f"{path}: selective",
            remedy="write full or none under recompute, or plan with --fix recompute=full",
            key="recompute",
        )
    if choice == "full":
        replace_forward(block, run_again)


def _tied(model: nn.Module) -> Ties:
    """Weights that several modules share, each with all its owners."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    return [places for places in owners.values() if len(places) > 1]


def _tie(ties: Ties) -> None:
    """Weights that are shared, shared again."""
    for (owner, name), *others in ties:
        for other, other_name in others:
            if pieces_of(owner, name) != pieces_of(other, other_name):
                raise PlannerError(
                    "modules that share a weight cut it alike",
                    value=f"{name} of {type(owner).__name__} and {other_name} of {type(other).__name__}",
                    remedy="give both the same split, or keep both whole",
                    key="modules",
                )
            other.register_parameter(other_name, owner._parameters[name])
