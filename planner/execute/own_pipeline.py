"""torch's schedules over the stages of a user's own module."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from planner.execute.mesh import Meshes
from planner.execute.own_stage import OwnStage
from planner.execute.phases import phase
from planner.execute.pipeline import SCHEDULES, SentStage
from planner.execute.sharding import DataParallel

Inputs = dict[str, Any]


class OwnPipeline:
    """The stage of this rank and the schedule that runs it; each microbatch's inputs are known on every rank."""

    def __init__(
        self,
        stage: OwnStage,
        meshes: Meshes,
        sharding: DataParallel,
        loss: Callable[[Any, Inputs], Tensor],
        microbatches: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        strategy = meshes.strategy
        self.stage, self.loss, self.dtype = stage, loss, dtype
        self.parts: list[Inputs] = []
        sent = torch.empty(stage.between.shape, dtype=dtype, device="meta", requires_grad=True)
        piece = SentStage(
            sharding,
            _InOrder(self),
            meshes.pp_rank,
            strategy.pp,
            device,
            input_args=torch.empty(1, dtype=torch.long, device="meta") if stage.is_first else sent,
            output_args=sent,  # of the last stage nobody asks
            group=meshes.pp.group,
        )
        self.schedule = SCHEDULES[strategy.schedule](piece, microbatches, loss_fn=self._loss, scale_grads=False)

    def run(self, parts: list[Inputs]) -> None:
        """All forwards and backwards; gradients are left as each rank has them."""
        self.parts = parts
        self.next = 0
        numbers = torch.arange(len(parts))
        args = (numbers,) if self.stage.is_first else ()
        with phase("backward"):
            self.schedule.step(*args, target=numbers if self.stage.is_last else None, return_outputs=False)
        self.parts = []

    def forward(self, received: Tensor | None) -> Any:
        """The next microbatch: both schedules run forwards in their order."""
        inputs = self.parts[self.next]
        self.next += 1
        with phase("forward"):
            out = self.stage(inputs, received)
        return out if self.stage.is_last else out.to(self.dtype)  # as sharding casts what a block is given

    def _loss(self, out: Any, number: Tensor) -> Tensor:
        return self.loss(out, self.parts[int(number)])


class _InOrder(nn.Module):
    """A stage as torch sees it: a number or what was received → what it sends, or what the module returns."""

    def __init__(self, pipeline: OwnPipeline) -> None:
        super().__init__()
        self.stage = pipeline.stage.module
        self.next, self.is_first = pipeline.forward, pipeline.stage.is_first

    def forward(self, x: Tensor) -> Any:
        return self.next(None if self.is_first else x)
