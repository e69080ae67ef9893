"""Gradients made whole: sums over tp that backward left open, and the norm over all ranks."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from planner.execute.mesh import Meshes, Peers
from planner.execute.parameters import Summed, local
from planner.execute.phases import phase
from planner.spec.orders import SPLIT_BACKWARD
from planner.spec.strategy import Schedule


def synchronise(summed: Iterable[Summed]) -> None:
    """Add the parts of gradients that ranks of a group hold, one all-reduce per group and dtype.

    A weight that two modules share is sent once.
    """
    parts: dict[tuple[int, torch.dtype], tuple[Peers, list[Tensor]]] = {}
    once = {(id(entry.parameter), id(entry.peers.group)): entry for entry in summed}
    for entry in once.values():
        grad = entry.parameter.grad
        if grad is not None:
            part = local(grad)
            parts.setdefault((id(entry.peers.group), part.dtype), (entry.peers, []))[1].append(part)
    with phase("gradient_sync"):
        for peers, tensors in parts.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.all_reduce(flat, group=peers.group)
            sums = flat.split([tensor.numel() for tensor in tensors])
            for tensor, total in zip(tensors, sums, strict=True):
                tensor.copy_(total.view_as(tensor))


def divide(module: nn.Module, divisor: Tensor) -> None:
    """Divide every gradient."""
    for parameter in module.parameters():
        if parameter.grad is not None:
            local(parameter.grad).div_(divisor)


@dataclass(frozen=True, slots=True)
class TiedEnds:
    """A table that embedding and head share although they belong to different stages: two equal copies.

    Each of them gets the sum of both gradients, so that they stay equal.
    """

    here: tuple[Summed, ...]  # the copies that this rank holds
    peers: Peers

    def synchronise(self) -> None:
        """Once a step, when the stages' own gradients are whole."""
        with phase("gradient_sync"):
            if len(self.here) == 2:
                first, second = (_own_gradient(copy) for copy in self.here)
                first.add_(second)
                second.copy_(first)
            elif self.here and self.peers.size > 1:
                part = _own_gradient(self.here[0])
                total = part.contiguous()
                dist.all_reduce(total, group=self.peers.group)
                part.copy_(total)


def _own_gradient(copy: Summed) -> Tensor:
    assert copy.parameter.grad is not None
    return local(copy.parameter.grad)


def clip_gradients(
    module: nn.Module,
    meshes: Meshes,
    summed: Iterable[Summed],
    greatest_norm: float,
    *,
    tied: TiedEnds | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Scale all gradients so that their norm over the whole model is at most this; return it as it was.

    Every rank adds the squares it holds, divided by the number of ranks that hold the same; one all-reduce
    of one number over all ranks. `dtype` is that of gradients, for a rank that has none.
    """
    copies = {
        id(entry.parameter): entry.peers.size
        for entry in summed
        if entry.peers.group is meshes.same_kv_head.group and entry.peers.group is not None
    }
    if tied is not None:
        copies |= {id(copy.parameter): 2 for copy in tied.here}
    with phase("clip"):
        squares: list[Tensor] = []
        held = [parameter for parameter in module.parameters() if parameter.grad is not None]
        for parameter in held:
            assert parameter.grad is not None
            part = local(parameter.grad)
            holders = _holders(parameter, meshes) * copies.get(id(parameter), 1)
            squares.append(_square_sum(part) / holders)
        nothing = torch.zeros((), dtype=dtype, device=meshes.dense.device_type)
        total = torch.stack(squares).sum() if squares else nothing
        dist.all_reduce(total)
        norm = total.sqrt()
        factor = (greatest_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in held:
            assert parameter.grad is not None
            local(parameter.grad).mul_(factor)
    return norm


def are_finite(module: nn.Module) -> bool:
    """Whether all gradients that this rank holds are numbers, read once and sent nowhere."""
    parts = [local(parameter.grad) for parameter in module.parameters() if parameter.grad is not None]
    return not parts or bool(torch.stack([part.sum(dtype=_single(part)) for part in parts]).isfinite().all())


def _square_sum(part: Tensor) -> Tensor:
    """Row by row: no second tensor of this size is filled, and sums of rows stay exact in single precision."""
    rows: Tensor = torch.linalg.vector_norm(part, dim=-1 if part.dim() else None, dtype=_single(part))
    return rows.square().sum()


def _single(part: Tensor) -> torch.dtype:
    return torch.promote_types(part.dtype, torch.float32)


def _holders(parameter: nn.Parameter, meshes: Meshes) -> int:
    """Ranks of a pipeline stage that hold the same piece of a parameter."""
    strategy = meshes.strategy
    ranks = strategy.gpus // strategy.pp
    if not isinstance(parameter, DTensor):
        return ranks
    pieces = 1
    for dim, placement in enumerate(parameter.placements):
        if not isinstance(placement, Replicate):
            pieces *= parameter.device_mesh.size(dim)
    return ranks // pieces


@functools.cache
def splits_backward() -> bool:
    """Whether torch makes gradients of weights later than those of inputs: 2.11 cannot, through our functions."""
    with torch.enable_grad():
        function: Any = _Same.apply(torch.zeros(1, requires_grad=True)).grad_fn
    try:
        return bool(function._input_metadata)
    except RuntimeError:
        return False


def whole_backward(schedule: Schedule) -> str:
    """That a schedule will not run as planned, in words; empty where it does."""
    if schedule not in SPLIT_BACKWARD or splits_backward():
        return ""
    return (
        f"torch {torch.__version__} makes gradients of weights and of inputs at once: "
        f"{schedule} waits longer than planned, and a newer torch does not"
    )


class _Same(torch.autograd.Function):
    """A function written in Python, as those that move values between ranks are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
