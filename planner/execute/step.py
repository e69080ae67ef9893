"""One optimizer step's microbatches through a stage: forward, loss, backward, gradients made whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from planner.execute.apply import Applied
from planner.execute.gradients import divide, synchronise
from planner.execute.objective import Objective
from planner.execute.phases import phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """What one stage reads: tokens or what an earlier stage sent, and labels or a later stage's gradient."""

    x: Tensor
    labels: Tensor | None = None
    gradient: Callable[[Tensor], Tensor] | None = None  # from what this stage gave, when backward comes
    length: int  # tokens of this rank in each sequence
    batch: Any = None  # what a loss function of the user's reads


def run_step(
    applied: Applied,
    microbatches: Sequence[Microbatch],
    *,
    objective: Objective | None = None,
) -> Tensor:
    """Run all microbatches; gradients are then those of the mean loss over all tokens of all ranks.

    Returns that mean on every rank; a stage without head returns zero.
    """
    objective = objective or Objective()
    objective.begin([applied], microbatches)
    for number, microbatch in enumerate(microbatches):
        root, gradient = run_forward(applied, microbatch, objective)
        applied.sharding.before_backward(last=number == len(microbatches) - 1)
        with phase("backward"):
            torch.autograd.backward(root, gradient(root))
        del root
    applied.sharding.finish()
    synchronise(applied.summed)
    mean = objective.finish([applied])
    if mean.divisor is not None:
        divide(applied.stage, mean.divisor)
    return mean.loss


def run_forward(
    applied: Applied, batch: Microbatch, objective: Objective
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What backward starts from, and where its gradient comes from."""
    with phase("forward"):
        out = applied.stage(batch.x, batch.length)
    if applied.stage.head is None:
        assert batch.gradient is not None, "a stage without head gets its gradient from the next one"
        return out, batch.gradient
    return objective.of(applied, out, batch), torch.ones_like
