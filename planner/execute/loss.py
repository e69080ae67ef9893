"""The loss, also over a vocabulary of which each rank has the logits of a part."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from planner.execute.mesh import Peers
from planner.models.norms import wide

IGNORED = -100


def token_loss_sum(logits: Tensor, labels: Tensor, vocab: int, peers: Peers) -> Tensor:
    """Cross-entropy summed over the tokens that count. Columns of all ranks behind `vocab` are padding.

    −log p = log Σ exp(x − max) − (x_label − max): one all-reduce for the maxima, one for the sums and the
    labels' logits together. Backward needs none, and works in the one copy that forward made.
    """
    loss: Tensor = _Loss.apply(logits.flatten(0, -2), labels.flatten(), vocab, peers)
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab: int, peers: Peers) -> Tensor:
        columns = logits.shape[1]
        first = peers.rank * columns
        real = min(max(vocab - first, 0), columns)
        exact = wide(logits[:0]).dtype
        rows = logits.shape[0]
        highest = logits.new_full((rows,), float("-inf"), dtype=exact)
        if real:
            highest = logits[:, :real].amax(1).to(exact)
        if peers.size > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=peers.group)
        weights = logits.to(exact, copy=True).sub_(highest[:, None])
        own = labels - first
        elsewhere = (own < 0) | (own >= real)
        own = own.masked_fill(elsewhere, 0)
        of_label = weights.gather(1, own[:, None])[:, 0].masked_fill(elsewhere, 0)
        weights[:, real:] = float("-inf")
        weights.exp_()
        both = torch.stack((weights.sum(1), of_label))
        if peers.size > 1:
            dist.all_reduce(both, group=peers.group)
        sums, of_label = both
        weights.div_(sums[:, None])
        counts = labels != IGNORED
        ctx.dtype = logits.dtype
        ctx.save_for_backward(weights, own, elsewhere, counts)
        return torch.where(counts, sums.log() - of_label, 0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """p − 1 at the label, p elsewhere; the weights are overwritten, so backward runs once."""
        weights, own, elsewhere, counts = ctx.saved_tensors
        here = torch.where(elsewhere, 0, -1).to(weights.dtype)
        weights.scatter_add_(1, own[:, None], here[:, None])
        weights.mul_((grads[0] * counts)[:, None])
        return weights.to(ctx.dtype), None, None, None
