"""Copies of a module of which each takes its own branches: gradients are sums over all of them."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from planner.execute.replicas import Replicas
from tests.execute.world import run_world

MICROBATCHES = 2


class Branches(nn.Module):
    """Equal layers, some of which a microbatch may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(4))

    def forward(self, x: Tensor, left_out: set[int]) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = x if number in left_out else torch.tanh(layer(x))
        return x.square().sum()


def left_out(rank: int, microbatch: int) -> set[int]:
    """The third by everyone, the second always by rank 1, the last one by rank 1 in its last microbatch."""
    if rank == 0:
        return {2}
    return {1, 2, 3} if microbatch == MICROBATCHES - 1 else {1, 2}


def errors_of_sums() -> list[float | None]:
    """By weight, how far its gradient is from the sum over ranks; None for those without one."""
    torch.manual_seed(0)
    module = Branches()
    alone = copy.deepcopy(module)
    data = torch.randn(dist.get_world_size(), MICROBATCHES, 3, 4, dtype=torch.float64)
    assert dist.group.WORLD is not None
    replicas = Replicas([[layer] for layer in module.layers] + [[module]], dist.group.WORLD, in_pipeline=False)
    for number, part in enumerate(data[dist.get_rank()]):
        loss = module(part, left_out(dist.get_rank(), number))
        replicas.before_backward(last=number == MICROBATCHES - 1)
        loss.backward()
    replicas.finish()
    for rank, own in enumerate(data):
        for number, part in enumerate(own):
            alone(part, left_out(rank, number)).backward()
    errors: list[float | None] = []
    for weight, expected in zip(module.parameters(), alone.parameters(), strict=True):
        assert (weight.grad is None) == (expected.grad is None)
        if weight.grad is not None and expected.grad is not None:
            errors.append(float((weight.grad - expected.grad).abs().max()))
        else:
            errors.append(None)
    return errors


def test_ranks_may_take_other_branches() -> None:
    for errors in run_world(2, errors_of_sums):
        assert [error is None for error in errors] == [False] * 4 + [True] * 2 + [False] * 2
        assert max(error for error in errors if error is not None) < 1e-12


def sums_of_thawed() -> list[float]:
    """Gradients of a weight that trains from the second step on, whatever was frozen in the first."""
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    assert dist.group.WORLD is not None
    replicas = Replicas([[module[0]], [module]], dist.group.WORLD, in_pipeline=False)
    for weight in module.parameters():
        nn.init.ones_(weight)
    found = []
    for trains in (False, True):
        module[0].requires_grad_(trains)
        module.zero_grad()
        replicas.before_backward(last=True)
        module(torch.full((1, 1), 1.0 + dist.get_rank())).backward()
        replicas.finish()
        found += [float(weight.grad) for weight in module.parameters() if weight.grad is not None]
    return found


def test_weights_may_be_thawed() -> None:
    assert run_world(2, sums_of_thawed) == [[3.0, 3.0, 3.0]] * 2
