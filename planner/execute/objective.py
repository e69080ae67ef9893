"""What a step minimises: the mean over all tokens that count, wherever and in whichever microbatch they are."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor  # no public test for a tensor without values exists

from planner.errors import PlannerError
from planner.execute.apply import Applied
from planner.execute.loss import IGNORED, token_loss_sum
from planner.execute.mesh import ALONE
from planner.execute.moves import convert, own_part
from planner.execute.phases import phase

if TYPE_CHECKING:
    from planner.execute.step import Microbatch

LossFunction = Callable[[Tensor, Any], tuple[Tensor, Any]]  # of output and batch: sum over tokens, their number


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """The mean of a step, the same on every rank, and what gradients are yet to be divided by."""

    loss: Tensor
    divisor: Tensor | None


class Objective:
    """The loss of one step. Without a function of the user's own it is cross-entropy, the tokens counted before.

    What a function counts is known when all microbatches have run, so gradients are divided at the end; and it
    reads whole logits, which are gathered for it where the plan has them in parts.
    """

    def __init__(self, function: LossFunction | None = None) -> None:
        self.function = function
        self.total = torch.zeros(())
        self.count = torch.zeros(())

    def begin(self, applied: Sequence[Applied], microbatches: Sequence[Microbatch]) -> None:
        """Before the first forward; `applied` are the stages of this rank."""
        device = microbatches[0].x.device
        self.total = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        if self.function is None:
            labels = [batch.labels for batch in microbatches if batch.labels is not None]
            own = sum(((each != IGNORED).sum() for each in labels), self.count)
            self.count = _over_ranks(applied, own)
            require_tokens(self.count)

    def of(self, applied: Applied, out: Tensor, batch: Microbatch) -> Tensor:
        """What backward of one microbatch starts from, on the last stage."""
        with phase("loss"):
            if self.function is None:
                loss = _cross_entropy(applied, out, batch)
                self.total += loss.detach()
                return loss / self.count.to(loss.dtype)
            own, count = self.function(_whole_logits(applied, out), batch.batch)
            self.total += own.detach()
            self.count += torch.as_tensor(count, device=self.count.device)
            return own

    def finish(self, applied: Sequence[Applied]) -> Mean:
        """After the last backward."""
        total = _over_ranks(applied, self.total, by_part=self.function is None)
        if self.function is None:
            return Mean(loss=total / self.count, divisor=None)
        count = _over_ranks(applied, self.count)
        require_tokens(count)
        return Mean(loss=total / count, divisor=count)


def _over_ranks(applied: Sequence[Applied], value: Tensor, *, by_part: bool = False) -> Tensor:
    """A sum over the ranks that read different tokens, on the last stage.

    Ranks of one tp group know the same; `by_part`, unless each has the loss of its own part of the sequence.
    """
    last = next((each for each in applied if each.stage.head is not None), None)
    counted = last is not None and (last.meshes.tp.rank == 0 or (by_part and last.logits == "sequence"))
    total = value.clone() if counted else torch.zeros_like(value)
    with phase("metadata"):
        dist.all_reduce(total)
    return total


def _cross_entropy(applied: Applied, out: Tensor, batch: Microbatch) -> Tensor:
    assert batch.labels is not None, "the last stage needs labels"
    columns = applied.meshes.tp if applied.logits == "features" else ALONE
    labels = batch.labels
    if applied.logits == "sequence":
        labels = own_part(labels, -1, applied.meshes.tp)
    return token_loss_sum(out, labels, applied.stage.spec.vocab, columns)


def _whole_logits(applied: Applied, out: Tensor) -> Tensor:
    if applied.meshes.tp.size == 1:
        return out
    whole = convert(out, applied.logits, "replicate", applied.meshes.tp)
    return whole[..., : applied.stage.spec.vocab]


def require_tokens(count: Tensor) -> None:
    if not isinstance(count, FakeTensor) and float(count) <= 0:
        raise PlannerError(
            "at least one token of a step counts",
            value=float(count),
            remedy="give labels other than -100, or a loss function that counts its tokens",
            key="batch",
        )
