"""Activations between layouts: whole, cut along the sequence or the features, or yet to be summed.

`convert` moves a tensor forward and its gradient back. A gradient has the layout of its tensor, but a tensor
that is whole may get gradients that are partial: each rank knows the part of its own columns.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from planner.execute.kept import kept_sum
from planner.execute.mesh import Peers
from planner.spec.plan import Layout

Gradient = Literal["same", "partial"]

_DIMS = {"sequence": -2, "features": -1}


def convert(x: Tensor, have: Layout, want: Layout, peers: Peers, *, gradient: Gradient = "same") -> Tensor:
    """x, which lies in layout `have`, in layout `want`; `gradient` is how the reader's gradient arrives."""
    back: Layout = "partial" if gradient == "partial" else want
    if peers.size == 1 or (have == want and back == _gradient_layout(have)):
        return x
    moved: Tensor = _Convert.apply(x, have, want, back, peers)
    return moved


class _Convert(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, have: Layout, want: Layout, back: Layout, peers: Peers) -> Tensor:
        ctx.moves = (back, _gradient_layout(have), peers)
        moved = move(x, have, want, peers)
        if moved is x and have != want:
            ctx.mark_dirty(x)  # summed in place
        return moved

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        have, want, peers = ctx.moves
        return move(grads[0], have, want, peers), None, None, None, None


def _gradient_layout(layout: Layout) -> Layout:
    """Each summand of a sum gets the whole gradient; otherwise a gradient lies as its tensor does."""
    return "replicate" if layout == "partial" else layout


def move(x: Tensor, have: Layout, want: Layout, peers: Peers) -> Tensor:
    """The same without gradients. A sum to be made whole is summed in place."""
    if have == want:
        return x
    if have == "partial":
        if torch.compiler.is_compiling():  # which keeps sums by the name of the operator
            return _reduced(x, peers) if want == "replicate" else reduce_scatter(x, _DIMS[want], peers)
        if want == "replicate":
            return kept_sum(lambda: _reduced(x, peers))
        return kept_sum(lambda: reduce_scatter(x, _DIMS[want], peers))
    if want == "replicate":
        return all_gather(x, _DIMS[have], peers)
    assert want != "partial", "nobody asks for summands"
    if have == "replicate":
        return own_part(x, _DIMS[want], peers)
    return _exchange(x, _DIMS[want], _DIMS[have], peers)


def _reduced(x: Tensor, peers: Peers) -> Tensor:
    """The sum over ranks, in place where x owns its memory."""
    if torch.compiler.is_compiling():
        return _as_operator(x, "all_reduce", 0, 0, peers)
    x = x.clone() if x._is_view() else x.contiguous()
    dist.all_reduce(x, group=peers.group)
    return x


def own_part(x: Tensor, dim: int, peers: Peers) -> Tensor:
    """This rank's piece, in memory of its own."""
    size = x.shape[dim] // peers.size
    return x.narrow(dim, peers.rank * size, size).clone(memory_format=torch.contiguous_format)


def all_gather(x: Tensor, dim: int, peers: Peers) -> Tensor:
    """The pieces of all ranks, joined along a dim."""
    if torch.compiler.is_compiling():
        return _as_operator(x, "all_gather", 0, dim, peers)
    out = x.new_empty((peers.size * x.numel(),))
    _all_gather_single(out, x.contiguous().view(-1), peers)
    return _joined(out.view(peers.size, *x.shape), dim)


def reduce_scatter(x: Tensor, dim: int, peers: Peers) -> Tensor:
    """The sum over ranks, of which each keeps its piece along a dim."""
    if torch.compiler.is_compiling():
        return _as_operator(x, "reduce_scatter", dim, 0, peers)
    stacked = _stacked(x, dim, peers.size)
    out = x.new_empty(stacked.shape[1:])
    _reduce_scatter_single(out.view(-1), stacked.view(-1), peers)
    return out


def _exchange(x: Tensor, cut: int, join: int, peers: Peers) -> Tensor:
    """Cut along one dim instead of another."""
    if torch.compiler.is_compiling():
        return _as_operator(x, "all_to_all", cut, join, peers)
    stacked = _stacked(x, cut, peers.size)
    out = torch.empty_like(stacked)
    dist.all_to_all_single(out, stacked, group=peers.group)
    return _joined(out, join)


def _stacked(x: Tensor, dim: int, count: int) -> Tensor:
    dim = dim % x.dim()
    pieces: Tensor = x.unflatten(dim, (count, x.shape[dim] // count))
    return pieces.movedim(dim, 0).contiguous()


def _joined(stacked: Tensor, dim: int) -> Tensor:
    dim = dim % (stacked.dim() - 1)
    return stacked.movedim(0, dim).flatten(dim, dim + 1)


def _all_gather_single(out: Tensor, x: Tensor, peers: Peers) -> None:
    """torch 2.13 renamed it."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, x, group=peers.group)


def _reduce_scatter_single(out: Tensor, x: Tensor, peers: Peers) -> None:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(out, x, group=peers.group)


def _as_operator(x: Tensor, kind: str, cut: int, join: int, peers: Peers) -> Tensor:
    """A collective as one operator, which a compiler neither looks into nor breaks a graph at."""
    moved: Tensor = exchange(x, kind, cut, join, peers.name, peers.rank, peers.size)
    return moved


@torch.library.custom_op("planner::exchange", mutates_args=())
def exchange(x: Tensor, kind: str, cut: int, join: int, group: str, rank: int, size: int) -> Tensor:
    """A collective over the group of this name; nothing is summed in place."""
    found = _resolve_process_group(group)  # type: ignore[arg-type]  # as torch's own collectives do with names
    peers = Peers(found, rank, size, group)
    if kind == "all_reduce":
        return _reduced(x.clone(), peers)
    if kind == "all_gather":
        return all_gather(x, join, peers)
    if kind == "reduce_scatter":
        return reduce_scatter(x, cut, peers)
    return _exchange(x, cut, join, peers)


@exchange.register_fake
def _(x: Tensor, kind: str, cut: int, join: int, group: str, rank: int, size: int) -> Tensor:
    shape = list(x.shape)
    if kind in ("reduce_scatter", "all_to_all"):
        shape[cut] //= size
    if kind in ("all_gather", "all_to_all"):
        shape[join] *= size
    return x.new_empty(shape)
