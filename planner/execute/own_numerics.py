"""A user's own module under a plan on local processes, against one process: loss, gradients, a step of AdamW."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from planner.execute.cut import tensors_in
from planner.execute.huggingface_build import in_double
from planner.execute.local_world import run_locally
from planner.execute.numerics import LONGEST_SECONDS, TOLERANCE, errors_beside, worst_of
from planner.execute.own_batches import own_loss
from planner.execute.own_shrink import SmallOwn, shrunk_own
from planner.execute.parameters import replaced
from planner.execute.runner import parallelize
from planner.models.build import generator_for
from planner.models.user_module import loaded
from planner.spec.plan import Plan
from planner.spec.sources import UserModule
from planner.spec.verification import Parity


def verify_own_numerics(plan: Plan, user: UserModule, processes: int) -> Parity:
    """Run a small copy of a plan on so many processes at most, and name everything that is not one process's.

    The module stays as it is: its values, moved a little, for what starts as zero would hide a gradient.
    """
    with loaded(user.path, user.function) as (module, example, _):
        small = shrunk_own(plan, module, example, processes)
        ranks = small.plan.strategy.gpus
        answers = run_locally(ranks, errors_of_own_step, small, user, seconds=LONGEST_SECONDS)
        return Parity(
            processes=ranks,
            strategy=small.plan.strategy,
            layers=small.plan.layer_count,
            tolerance=TOLERANCE,
            values=worst_of(answers, module),
            ran=small.told,
        )


def errors_of_own_step(small: SmallOwn, user: UserModule) -> dict[str, float]:
    """Largest relative errors on this rank, by what is compared."""
    with redirect_stdout(sys.stderr), in_double(), without_dropout():
        torch.manual_seed(0)
        with loaded(user.path, user.function, device="cpu") as (model, example, _):
            model.double()
            _same_on_all_ranks(model)
            loss_fn = None if small.returns_loss else summed_up
            runner = parallelize(model, small.plan, loss_fn=loss_fn, example=example)

            def alone() -> Tensor:
                total, count = (loss_fn or own_loss)(model(**small.batch), small.batch)
                return total / count

            return errors_beside(model, alone, runner, small.batch)


def summed_up(out: Any, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """A loss for a module that returns none: squares, and sums that weigh the last dim unequally."""
    rows = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    total = torch.zeros((), dtype=torch.float64)
    for x in tensors_in(out):
        if x.is_floating_point() and x.dim():
            weights = torch.randn(x.shape[-1], generator=generator_for("loss"), dtype=torch.float64)
            total = total + (x * weights).sum() + x.square().sum()
    return total, rows


def _same_on_all_ranks(model: nn.Module) -> None:
    """The values of rank 0, for drawing them may depend on more than a seed; each moved, and none across zero."""
    with torch.no_grad():
        for path, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator_for(path), dtype=torch.float64)
            value.mul_(1 + 0.1 * noise).add_(0.02 * noise * (value == 0))
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)


@contextmanager
def without_dropout() -> Iterator[None]:
    """Inside, nothing is dropped: one process and several would drop different numbers."""
    attention = F.scaled_dot_product_attention

    def attend(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, *others: Any, **named: Any
    ) -> Any:
        return attention(q, k, v, attn_mask, 0.0, *others, **named)

    def keep(x: Any, *_: Any, **__: Any) -> Any:
        return x

    with (
        replaced(F, "scaled_dot_product_attention", attend),
        replaced(F, "dropout", keep),
        replaced(F, "dropout1d", keep),
        replaced(F, "dropout2d", keep),
        replaced(F, "dropout3d", keep),
        replaced(F, "alpha_dropout", keep),
        replaced(F, "feature_alpha_dropout", keep),
        replaced(torch, "dropout", keep),
    ):
        yield
