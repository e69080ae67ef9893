"""A plan's pipeline on torch's schedules: each virtual stage a PipelineStage, in the order that the plan names.

torch moves the numbers of microbatches and what stages send one another; tokens and labels stay here. Sharding is
ours too, so torch sees stages wrapped in modules that FSDP does not know: gradients are reduced once, at the end.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from planner.execute.apply import Applied
from planner.execute.mesh import Meshes
from planner.execute.objective import Objective
from planner.execute.phases import phase
from planner.execute.sharding import DataParallel
from planner.execute.step import Microbatch
from planner.spec.orders import ONE_STAGE_A_RANK
from planner.spec.strategy import Schedule, Strategy

SCHEDULES: dict[Schedule, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


def shape_between(strategy: Strategy, length: int, hidden: int) -> tuple[int, int, int]:
    """Of what a stage receives from the one before: its rank's tokens, with sp cut over tp as well."""
    own = length // strategy.cp
    return strategy.microbatch, own // strategy.tp if strategy.sp else own, hidden


class Pipeline:
    """The virtual stages of this rank, by number, and the schedule that runs them."""

    def __init__(
        self,
        stages: dict[int, Applied],
        meshes: Meshes,
        objective: Objective,
        *,
        microbatches: int,
        length: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        strategy = meshes.strategy
        self.objective = objective
        self.count = strategy.pp * strategy.vpp
        self.has_first, self.has_last = 0 in stages, self.count - 1 in stages
        self.last = stages.get(self.count - 1)
        self.microbatches: Sequence[Microbatch] = ()
        own = length // strategy.cp
        shape = shape_between(strategy, length, next(iter(stages.values())).stage.spec.hidden)
        sent = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
        pieces = [
            SentStage(
                applied.sharding,
                _Numbered(applied, self, own) if number == 0 else _Received(applied, own),
                number,
                self.count,
                device,
                input_args=torch.empty(1, dtype=torch.long, device="meta") if number == 0 else sent,
                output_args=sent,  # of the last stage nobody asks: it sends nothing
                group=meshes.pp.group,
                dw_builder=_whole_backward if applied.at_once else None,
            )
            for number, applied in stages.items()
        ]
        one = strategy.schedule in ONE_STAGE_A_RANK
        self.schedule = SCHEDULES[strategy.schedule](
            pieces[0] if one else pieces, microbatches, loss_fn=self._loss, scale_grads=False
        )

    def run(self, microbatches: Sequence[Microbatch]) -> None:
        """All forwards and backwards; gradients are left as each rank has them."""
        self.microbatches = microbatches
        numbers = torch.arange(len(microbatches))
        args = (numbers,) if self.has_first else ()
        with phase("backward"):
            self.schedule.step(*args, target=numbers if self.has_last else None, return_outputs=False)
        self.microbatches = ()

    def _loss(self, out: Tensor, number: Tensor) -> Tensor:
        assert self.last is not None
        return self.objective.of(self.last, out, self.microbatches[int(number)])


class SentStage(PipelineStage):
    """torch 2.11 greets neighbours with messages that hang where a V has two of them on one rank.

    And it compares what a stage puts out with what it sends, which the last one does not: those are its logits.
    """

    def __init__(self, sharding: DataParallel, module: nn.Module, *args: Any, **keys: Any) -> None:
        super().__init__(module, *args, **keys)
        self._sharding = sharding

    def backward_weight_one_chunk(self, *args: Any, **keys: Any) -> None:
        super().backward_weight_one_chunk(*args, **keys)
        self._sharding.after_weights()

    def _get_init_p2p_neighbors_ops(self) -> list[Any]:
        return []

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        if not self.is_last:
            super()._validate_fwd_outputs(outputs)  # type: ignore[misc]


def _whole_backward() -> Callable[[], None]:
    """What is left for the weights' part where torch 2.11 cannot split a backward: nothing."""
    return lambda: None


class _Numbered(nn.Module):
    """The first stage: the number of a microbatch → what it sends."""

    def __init__(self, applied: Applied, pipeline: Pipeline, length: int) -> None:
        super().__init__()
        self.stage = applied.stage
        self.length = length
        self.read = lambda number: pipeline.microbatches[int(number)].x

    def forward(self, number: Tensor) -> Tensor:
        with phase("forward"):
            out: Tensor = self.stage(self.read(number), self.length)
        return out


class _Received(nn.Module):
    """A later stage: what was received → what it sends, or logits."""

    def __init__(self, applied: Applied, length: int) -> None:
        super().__init__()
        self.stage = applied.stage
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        with phase("forward"):
            out: Tensor = self.stage(x, self.length)
        return out
