"""A pipeline rank of a user's own module in a world without peers: what its steps issue and take."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from planner.errors import PlannerError
from planner.execute.cut import RefusedError, refusal, tensors_in
from planner.execute.dry_rank import DrySteps, Waiting
from planner.execute.gradients import synchronise
from planner.execute.own_batches import loss_in, meta_inputs, own_loss
from planner.execute.own_module import OwnRunner, Ties
from planner.execute.own_pipeline import OwnPipeline
from planner.execute.own_splits import place_of
from planner.execute.own_stage import OwnStage
from planner.execute.phases import phase
from planner.execute.weights import Fill
from planner.models.user_module import Example
from planner.spec.orders import Kind, messages
from planner.spec.plan import Plan
from planner.spec.workload import TrainWorkload


class DryOwnRank(DrySteps):
    """What rank `rank` of the pipeline would hold and issue, as this rank of a fake world.

    `model` is on the meta device, and left as it is. Where it returns no loss its results are summed: what a
    loss of the user's does beyond that is not known.
    """

    def __init__(self, model: nn.Module, example: Example, plan: Plan, rank: int) -> None:
        assert isinstance(plan.workload, TrainWorkload), "checked before"
        strategy = plan.strategy
        self.workload, self.fake_mode, self.numbers = plan.workload, FakeTensorMode(), (rank,)
        self.receivers: dict[int, dict[Kind, int]] = {
            rank: messages(strategy.schedule, strategy.pp, strategy.vpp, rank)
        }
        self.inputs = meta_inputs(example, strategy.microbatch, self.workload.seq_len, torch.float32)
        self.runner = _Unfilled(model, plan, self.workload, self.fake_mode, example)
        self.meshes, self.module = self.runner.meshes, self.runner.module
        self.shardings = {rank: self.runner.sharding}
        self.summed, self.tied = self.runner.summed, self.runner.tied
        self._make_ready()

    def _forward(self, number: int) -> Waiting:
        stage = self.runner.stage
        inputs = {key: _like(value) for key, value in self.inputs.items()}
        received = None
        if stage is not None and not stage.is_first:
            received = torch.empty(stage.between.shape, dtype=self.runner.sent_dtype, requires_grad=True)
        with phase("forward"), _told_where():
            out = self.runner.result_of(self.module(**inputs)) if stage is None else stage(inputs, received)
        arrived = next(tensors_in(inputs)) if received is None else received
        if stage is not None and not stage.is_last:
            return Waiting(arrived, out, torch.empty_like)
        return Waiting(arrived, _loss(out, inputs), torch.ones_like)

    def _synchronise(self) -> None:
        synchronise([*self.summed, *self.runner.ends])


class _Unfilled(OwnRunner):
    """A runner whose weights take memory that is counted, and hold no values."""

    def __init__(
        self, model: nn.Module, plan: Plan, workload: TrainWorkload, fake_mode: FakeTensorMode, example: Example
    ) -> None:
        self.fake_mode = fake_mode
        device = torch.device("cpu")
        super().__init__(model, plan, workload, None, device, _nothing, example, compiled=False)

    def _take_memory(self) -> None:
        made: dict[int, nn.Parameter] = {}
        with self.fake_mode:
            for module in self.module.modules():
                for name, weight in module._parameters.items():
                    if weight is not None:
                        empty = nn.Parameter(_like(weight), requires_grad=weight.requires_grad)
                        module._parameters[name] = made.setdefault(id(weight), empty)
                for name, buffer in module._buffers.items():
                    module._buffers[name] = None if buffer is None else _like(buffer)

    def _fill(self, ties: Ties, fill: Fill) -> None:
        pass

    def _stand_in(self, stage: OwnStage) -> None:
        with self.fake_mode:
            super()._stand_in(stage)

    def _pipeline(self) -> OwnPipeline | None:
        return None


@contextmanager
def _told_where() -> Iterator[None]:
    """What a user's code does that needs values is no fault of ours."""
    try:
        yield
    except RefusedError as error:
        raise refusal(error, place_of(error)) from None
    except PlannerError:
        raise
    except Exception as error:
        told, *_ = str(error).splitlines() or [""]
        raise PlannerError(
            "the module runs without values, which a dry run has none of",
            value=f"{type(error).__name__}: {told} ({place_of(error)})",
            remedy="keep decisions that depend on values out of forward; explain, estimate and run in a script of "
            "your own take this plan as it is",
            key="model",
        ) from error


def _loss(out: Any, inputs: dict[str, Any]) -> Tensor:
    """What backward starts from."""
    if loss_in(out) is not None:
        return own_loss(out, inputs)[0]
    return torch.stack([x.sum() for x in tensors_in(out) if x.is_floating_point()]).sum()


def _like(value: Any) -> Any:
    """A tensor of the CPU like one of the meta device."""
    return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _nothing(module: nn.Module) -> None:
    raise AssertionError("a dry run has no values")
