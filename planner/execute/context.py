"""Context parallel: each rank holds two chunks of a sequence, one from either end, so that work is even.

Of 2·cp chunks rank r has r and 2·cp−1−r. Attention gathers keys and values of all chunks in one collective;
its backward sums their gradients with one reduce-scatter. Or they travel around the ranks (`ring`).
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from planner.execute.mesh import Peers
from planner.execute.moves import all_gather, reduce_scatter
from planner.execute.parameters import replace_forward
from planner.execute.ring import attention_in_ring
from planner.execute.stage import Stage
from planner.models.attention import Core
from planner.spec.workload import Context

Forward = Callable[..., Any]


def own_positions(length: int, peers: Peers, device: torch.device | str = "cpu") -> Tensor:
    """Positions of this rank's `length` tokens in the sequence that the group shares."""
    chunk = length // 2
    within = torch.arange(chunk, device=device)
    last = 2 * peers.size - 1
    return torch.cat((peers.rank * chunk + within, (last - peers.rank) * chunk + within))


def own_tokens(tokens: Tensor, peers: Peers) -> Tensor:
    """This rank's columns of whole sequences [batch, length]."""
    if peers.size == 1:
        return tokens
    return tokens[:, own_positions(tokens.shape[1] // peers.size, peers, tokens.device)]


def spread_over_context(stage: Stage, peers: Peers, context: Context = "gather") -> None:
    """Let a stage run on this rank's chunks."""
    if peers.size == 1:
        return
    stage.positions_of = lambda length, device: own_positions(length, peers, device)
    stage.length_factor = peers.size
    if stage.embedding is not None and stage.embedding.positions is not None:
        _look_up_own(stage.embedding.positions, peers)
    for module in stage.modules():
        if isinstance(module, Core):
            replace_forward(module, partial(_passing if context == "ring" else _gathering, module, peers))


def _look_up_own(table: nn.Module, peers: Peers) -> None:
    def wrap(forward: Forward) -> Forward:
        def run(index: Tensor) -> Any:  # consecutive numbers, from the first position that the table knows
            return forward(own_positions(index.shape[0], peers, index.device) + index[:1])

        return run

    replace_forward(table, wrap)


def _gathering(core: Core, peers: Peers, forward: Forward) -> Forward:
    def run(q: Tensor, k: Tensor, v: Tensor, *positions: Any) -> Any:
        depth = k.shape[-1]
        both = _InOrder.apply(torch.cat((k, v), -1), peers)
        k, v = both[..., :depth], both[..., depth:]
        if not core.is_causal:
            return forward(q, k, v, *positions)
        chunk = q.shape[2] // 2
        outs = []
        for number, part in zip((peers.rank, 2 * peers.size - 1 - peers.rank), q.split(chunk, 2), strict=True):
            seen = (number + 1) * chunk
            outs.append(forward(part, k[:, :, :seen], v[:, :, :seen], *positions))
        return torch.cat(outs, 2)

    return run


def _passing(core: Core, peers: Peers, _: Forward) -> Forward:
    def run(q: Tensor, k: Tensor, v: Tensor, *positions: Any) -> Tensor:
        return attention_in_ring(q, k, v, core.scale, peers)

    return run


class _InOrder(torch.autograd.Function):
    """Chunks [b, g, 2·c, d] of all ranks as one sequence; its gradient goes back as a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        gathered = all_gather(x, 2, peers).unflatten(2, (2 * peers.size, -1))
        in_order: Tensor = gathered[:, :, _places(peers.size, x.device)].flatten(2, 3)
        return in_order

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        peers = ctx.peers
        chunks = grads[0].unflatten(2, (2 * peers.size, -1))
        by_rank = torch.tensor(_order(peers.size), device=grads[0].device)
        return reduce_scatter(chunks[:, :, by_rank].flatten(2, 3), 2, peers), None


def _order(ranks: int) -> list[int]:
    """Chunks in the order in which ranks hold them: 0, last, 1, last but one, …"""
    return [chunk for rank in range(ranks) for chunk in (rank, 2 * ranks - 1 - rank)]


def _places(ranks: int, device: torch.device) -> Tensor:
    """Where each chunk of the sequence lies in that order."""
    order = _order(ranks)
    return torch.tensor([order.index(chunk) for chunk in range(2 * ranks)], device=device)
